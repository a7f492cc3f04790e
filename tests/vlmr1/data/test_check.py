"""`vlmr1 data check`: every planted fault is found at its line, and nothing else."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.helpers.digit_runs import command
from tests.helpers.pictures import png_of
from tests.helpers.rows import row, write
from vlmr1.cli import main
from vlmr1.commands.data_check import check_data
from vlmr1.commands.prompt_lengths import prompt_measure
from vlmr1.data.prompts import without_overlong
from vlmr1.data.samples import load_samples
from vlmr1.errors import DataError, SettingError
from vlmr1.models import load_processor
from vlmr1.rewards.registry import Reward
from vlmr1.tiny import CHECKPOINT

LIMIT = 60  # tokens


@pytest.fixture(scope="module")
def measure():
    return prompt_measure(load_processor(CHECKPOINT))


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    for name in ("a.png", "b.png", "cut.png", "../outside.png"):
        Image.fromarray(noise).save(images / name)
    (images / "cut.png").write_bytes((images / "cut.png").read_bytes()[:-900])
    (images / "bomb.png").write_bytes(png_of(30_000, 30_000))
    return tmp_path


PLANTED = {
    "json": b'{"image": "a.png", ',
    "encoding": '{"image": "é"}'.encode("latin-1"),
    "not a row": [1, 2],
    "conversations": {"image": "a.png"},
    "turn": row(conversations=[{"from": "tool", "value": "x"}]),
    "markers": row("<image> or <image>?"),
    "image name": row(image=3),
    "missing image": row(image="none.png"),
    "image outside": row(image="../outside.png"),
    "image undecodable": row(image="cut.png"),
    "image too large": row(image="bomb.png"),
    "solution": row(gpt="<answer>no box</answer>"),
    "column": row(completions="x"),
    "empty turn": row(" ", image=None),
    "prompt length": row("<image>" + "Where? " * 60),
}


def test_exactly_the_planted_faults_are_found(folder, measure):
    """15 kinds, each at a line of its own, good rows and a blank line between them."""
    lines, expected = [row()], []
    for kind, line in PLANTED.items():
        lines += [line, row(image=None, human="Where?"), b""]
        expected.append((f"{folder}/data.jsonl:{len(lines) - 2}", kind))
    path = write(folder / "data.jsonl", *lines)
    findings = check_data(
        [path], [folder / "images"], rewards=["accuracy", "format"], measure=measure, max_prompt_length=LIMIT
    )
    assert [(fault.source, fault.kind) for fault in findings.faults] == expected
    assert (findings.status, findings.rows, findings.images) == (1, 1 + 2 * len(PLANTED), 3)
    assert len(findings.lengths) == 2 + len(PLANTED)  # the good rows, and the long one
    assert sum(length > LIMIT for length in findings.lengths) == 1


def test_every_fault_of_a_row_is_found(folder):
    path = write(
        folder / "data.jsonl", row("<image><image><image>?", "no box", image=["x.png", "cut.png", "../outside.png"])
    )
    findings = check_data([path], [folder / "images"], rewards=["accuracy"])
    assert sorted((fault.source, fault.kind) for fault in findings.faults) == [
        (f"{path}:1", "image outside"),
        (f"{path}:1", "image undecodable"),
        (f"{path}:1", "missing image"),
        (f"{path}:1", "solution"),
    ]


def test_faults_of_several_files_are_in_their_order(folder):
    rows = [row(image="none.png"), row(image="cut.png"), row(image="cut.png"), row(gpt=None)]
    path = write(folder / "data.jsonl", *rows)
    (folder / "empty.jsonl").write_text("\n")
    (folder / "more.jsonl").write_bytes(path.read_bytes())
    findings = check_data([path, folder / "empty.jsonl", folder / "more.jsonl"], [folder / "images"])
    assert [(fault.source.removeprefix(f"{folder}/"), fault.kind) for fault in findings.faults] == [
        ("data.jsonl:1", "missing image"),
        ("data.jsonl:2", "image undecodable"),  # once, for the first row that names it
        ("data.jsonl:4", "solution"),
        ("more.jsonl:1", "missing image"),
        ("more.jsonl:4", "solution"),
        ("empty.jsonl", "empty file"),
    ]


def test_a_reward_of_the_users_own(folder):
    def check(sample):
        if "digit" not in sample.columns:
            raise DataError(f"{sample.source}: no digit")

    path = write(folder / "data.jsonl", row(digit=3), row())
    reward = Reward("mine", lambda **_: [], check)
    (fault,) = check_data([path], [folder / "images"], rewards=[reward]).faults
    assert str(fault) == f"{path}:2: solution: no digit"


def test_an_image_that_the_processor_does_not_take(folder, measure):
    Image.new("L", (28, 6000)).save(folder / "images" / "thin.png")
    path = write(folder / "data.jsonl", row(image="thin.png"))
    (fault,) = check_data([path], [folder / "images"], measure=measure).faults
    assert re.fullmatch(r".*:1: prompt: absolute aspect ratio must be smaller than 200, got 214\.2.*", str(fault))


def test_lengths_are_those_of_the_trainer(folder, measure, make):
    path = write(
        folder / "data.jsonl",
        row(),
        row("Where is <image> in <image>?", image=["a.png", "b.png"]),
        row("1?", image=None),
    )
    samples = load_samples([path], [folder / "images"], question="{question}", check_images=False)
    findings = check_data([path], [folder / "images"], measure=measure)
    assert findings.lengths == [len(make.builder(sample).input_ids) for sample in samples]
    assert findings.faults == []


def check(images, *words):
    """The status of the command."""
    return main(["data", "check", *map(str, words), "--images", str(images)])


def test_the_command_prints_each_fault(folder, capsys):
    path = write(folder / "data.jsonl", row(), row(image="none.png"), row(gpt="x"))
    assert check(folder / "images", path, "--reward_funcs", "accuracy") == 1
    template, missing, solution, counts, total = capsys.readouterr().out.splitlines()
    assert template == "question_template auto: rec"
    assert missing == f"{path}:2: missing image: image none.png is missing in {folder}/images"
    assert solution.startswith(f"{path}:3: solution: the solution has no box")
    assert counts == "2 of 3 rows have images"
    assert total == "3 rows, 1 images: 2 faults (1 missing image, 1 solution)"


def test_the_command_counts_tokens(folder, capsys):
    path = write(folder / "data.jsonl", row(), row(), row("1 + 1?", image=None))
    assert check(folder / "images", path, "--model", "tiny", "--question_template", "rec") == 0
    template, first, *bars, counts, last = capsys.readouterr().out.splitlines()
    assert (template, first, counts, last) == (
        "question_template: rec",
        "tokens a prompt:",
        "2 of 3 rows have images",
        "3 rows, 1 images: no faults",
    )
    assert [int(bar.split()[-1]) for bar in bars if bar.split()[-1] != "0"] == [1, 2]


# The rows of the recipes


STANDINS = Path(__file__).parents[2] / "data" / "standins"
IMAGES = STANDINS / "images"
RECIPES = Path(__file__).parents[3] / "vlmr1" / "recipes"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in STANDINS.glob("*.jsonl")))
def test_rows_of_a_recipe(recipe, capsys):
    settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    words = ["--reward_funcs", *settings["reward_funcs"], "--question_template", settings["question_template"]]
    words += ["--accu_reward_method", *settings.get("accu_reward_method", ["iou"])]
    words += ["--box_coordinates", settings.get("box_coordinates", "auto")]
    words += ["--reward_mode", settings.get("reward_mode", "strict")]
    assert check(IMAGES, STANDINS / f"{recipe}.jsonl", *words) == 0, capsys.readouterr().out


def test_a_method_for_each_file(capsys):
    files = [STANDINS / "rec-3b.jsonl", STANDINS / "ovd-3b.jsonl"]
    words = ["--reward_funcs", "accuracy", "--accu_reward_method"]
    assert check(IMAGES, *files, *words, "iou:odLength") == check(IMAGES, *files, *words, "iou", "odLength") == 0
    assert check(IMAGES, *files, *words, "odLength:iou") == check(IMAGES, *files, *words, "iou") == 1
    assert check(IMAGES, *files[1:], *words, "llm") == 0  # the judge is not asked
    capsys.readouterr()
    assert check(IMAGES, *files, *words, "iou", "map", "mcq") == 2
    assert "accu_reward_method has 3 methods for 2 data files" in capsys.readouterr().err


def test_the_mode_decides(tmp_path, capsys):
    """The published code reads a box without area, and needs the tags."""
    shared = {"image": min(path.name for path in IMAGES.iterdir()), "prompt": "<image>?"}
    for solution, strict in (("<answer>[30, 40, 1, 2]</answer>", 1), ("[1, 2, 30, 40]", 0)):
        path = write(tmp_path / "rows.jsonl", shared | {"solution": solution})
        assert check(IMAGES, path, "--reward_funcs", "accuracy") == strict
        assert check(IMAGES, path, "--reward_funcs", "accuracy", "--reward_mode", "vlm_r1") == 1 - strict


# Boxes of solutions that cannot be true: image a.png has 56 x 56 px

FRACTIONS, THOUSANDTHS, CORNERS = (0.1, 0.2, 0.5, 0.6), (100, 100, 700, 700), (40, 10, 20, 30)


def boxes_of(*boxes):
    return json.dumps([{"bbox_2d": box, "label": "cat"} for box in boxes])


IMPOSSIBLE = {  # method, solution, what the fault says
    "iou": ("iou", boxes_of(FRACTIONS), "the box [0.1, 0.2, 0.5, 0.6] of the solution: it lies within one pixel"),
    "bare": ("iou", str(list(THOUSANDTHS)), "it leaves the image of 56 x 56 px by more than 2 px: perhaps it is in"),
    "one of two": ("od_ap", boxes_of((0, 0, 4, 4), THOUSANDTHS), "the box [100, 100, 700, 700] of the solution"),
    "in a fence": ("weighted_sum", f"```json\n{boxes_of(CORNERS)}\n```", "x2 is below x1: perhaps it is x, y, width"),
    "click": ("point_in_box", boxes_of((3, 3, 3.5, 9)), "it is smaller than a pixel"),
    "resized by the reward": ("iou_qwen", boxes_of(FRACTIONS), "in fractions of 1"),
    "as written": ("iou_glm", boxes_of(CORNERS), "x2 is below x1"),
}


def check_and_train(folder, method, solution, *more):
    """The statuses of `data check` and `train` on a good row and one with this solution."""
    path = write(folder / "data.jsonl", row(), row(gpt=f"<answer>{solution}</answer>", accu_reward_method=method))
    more = ["--reward_funcs", "accuracy", *more]
    checked = check(folder / "images", path, "--model", "tiny", *more)
    small = {"max_steps": 1, "prompts_per_device": 1, "num_generations": 2, "max_completion_length": 4}
    return checked, main(command(folder, folder / "out", *more, **small, data_file_paths=path))


@pytest.mark.parametrize(("method", "solution", "says"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_an_impossible_box_is_a_fault_of_its_row(method, solution, says, folder, capsys):
    assert check_and_train(folder, method, solution) == (1, 2)
    found = capsys.readouterr()
    assert any(
        line.startswith(f"{folder}/data.jsonl:2: solution: ") and says in line for line in found.out.splitlines()
    )
    assert f"vlmr1: {folder}/data.jsonl:2: the box" in found.err and says in found.err


@pytest.mark.parametrize(
    ("method", "solution", "more"),
    [
        pytest.param("iou", boxes_of(FRACTIONS), ["--box_coordinates", "original"], id="original"),
        pytest.param("od_ap", boxes_of(THOUSANDTHS), ["--box_coordinates", "original"], id="original, detection"),
        pytest.param("iou_internvl", boxes_of(THOUSANDTHS), [], id="compared as written"),
        pytest.param("iou", boxes_of((-2, 0, 58, 57)), [], id="two pixels outside"),
        pytest.param("default", str(list(THOUSANDTHS)), [], id="no box is read"),
        pytest.param("od_ap", "None", [], id="no box"),
    ],
)
def test_a_box_that_may_be_true_trains(method, solution, more, folder):
    assert check_and_train(folder, method, solution, *more) == (0, 0)


def test_boxes_are_checked_without_a_model(folder):
    path = write(folder / "data.jsonl", row(gpt=f"<answer>{list(THOUSANDTHS)}</answer>"))
    shared = [folder / "images", path, "--reward_funcs", "accuracy"]
    assert [check(*shared), check(*shared, "--box_coordinates", "original")] == [1, 0]
    assert check(*shared, "--reward_mode", "vlm_r1") == 0  # the published code compares as it does
    as_in_training = ["--data_file_paths", path, "--image_folders", folder / "images"]
    assert [check(*shared[:2]), main(["data", "check", *map(str, as_in_training)])] == [1, 1]
    text_only = write(folder / "text.jsonl", row("Where?", image=None, gpt=str(list(THOUSANDTHS))))
    assert check(folder / "images", text_only) == 0  # a list of numbers


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (7, "2 of 9 rows are left out: their prompts have more than 7 tokens: {0}:8 (8 tokens), {0}:9 (9 tokens)"),
        (4, "5 of 9 rows are left out: their prompts have more than 4 tokens: {0}:5 (5 tokens), "),
        (1, "{0}:6 (6 tokens) and 3 more; `vlmr1 data check` with --model and --max_prompt_length 1 lists all"),
    ],
)
def test_rows_that_are_left_out_are_named(limit, says, folder, caplog):
    path = write(folder / "data.jsonl", *(row("x" * (i + 1), image=None) for i in range(9)))
    samples = load_samples([path], [], question="{question}", check_images=False)

    def build(sample):
        return SimpleNamespace(input_ids=sample.messages[0]["content"][0]["text"])  # a token a letter

    assert [sample.index for sample in without_overlong(samples, build, limit)] == list(range(limit))
    (message,) = caplog.messages
    assert says.format(path) in message and ("more" in message.split("tokens:")[1]) == (limit == 1)
    with pytest.raises(SettingError, match="max_prompt_length is 0: every one of the 9 prompts is longer"):
        without_overlong(samples, build, 0)


def test_several_rows_take_part(folder, capsys):
    """The rows that the settings of a run take of each file, with their own lines."""
    path = write(folder / "data.jsonl", row(gpt="x"), row(), row(gpt="x"))
    shared = [folder / "images", path, "--reward_funcs", "accuracy", "--sampling_strategy"]
    assert check(*shared, "end:2") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{path}: 2 of 3 rows are taken" and lines[2].startswith(f"{path}:3: solution")
    assert lines[-1] == "2 rows, 1 images: 1 faults (1 solution)"
