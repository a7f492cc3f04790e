"""`vlmr1 data check`: every planted fault is found at its line, and nothing else."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.helpers.pictures import png_of
from vlmr1.cli import main
from vlmr1.commands.data import add_arguments
from vlmr1.commands.data_check import check_data, prompt_measure
from vlmr1.commands.data_check import run as run_command
from vlmr1.data.samples import load_samples
from vlmr1.models import load_processor
from vlmr1.rewards.registry import Reward
from vlmr1.tiny import CHECKPOINT

BOX = '<answer>{"bbox_2d": [0, 0, 4, 4]}</answer>'
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


def row(human="<image>Where?", gpt=BOX, **columns):
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"image": "a.png", "conversations": turns} | columns


def write(folder, lines):
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


PLANTED = {
    "json": b'{"image": "a.png", ',
    "encoding": '{"image": "é"}'.encode("latin-1"),
    "not a row": [1, 2],
    "conversations": {"image": "a.png"},
    "turn": row(conversations=[{"from": "system", "value": "x"}]),
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
    path = write(folder, lines)
    findings = check_data(
        [path], [folder / "images"], rewards=["accuracy", "format"], measure=measure, max_prompt_length=LIMIT
    )
    assert [(fault.source, fault.kind) for fault in findings.faults] == expected
    assert (findings.status, findings.rows, findings.images) == (1, 1 + 2 * len(PLANTED), 3)
    assert len(findings.lengths) == 2 + len(PLANTED)  # the good rows, and the long one
    assert sum(length > LIMIT for length in findings.lengths) == 1


def test_every_fault_of_a_row_is_found(folder):
    path = write(folder, [row("<image><image><image>?", "no box", image=["x.png", "cut.png", "../outside.png"])])
    findings = check_data([path], [folder / "images"], rewards=["accuracy"])
    assert sorted((fault.source, fault.kind) for fault in findings.faults) == [
        (f"{path}:1", "image outside"),
        (f"{path}:1", "image undecodable"),
        (f"{path}:1", "missing image"),
        (f"{path}:1", "solution"),
    ]


def test_faults_of_several_files_are_in_their_order(folder):
    rows = [row(image="none.png"), row(image="cut.png"), row(image="cut.png"), row(gpt=None)]
    path = write(folder, rows)
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
    from vlmr1.errors import DataError

    def check(sample):
        if "digit" not in sample.columns:
            raise DataError(f"{sample.source}: no digit")

    path = write(folder, [row(digit=3), row()])
    reward = Reward("mine", lambda **_: [], check)
    (fault,) = check_data([path], [folder / "images"], rewards=[reward]).faults
    assert str(fault) == f"{path}:2: solution: no digit"


def test_an_image_that_the_processor_does_not_take(folder, measure):
    Image.new("L", (28, 6000)).save(folder / "images" / "thin.png")
    path = write(folder, [row(image="thin.png")])
    (fault,) = check_data([path], [folder / "images"], measure=measure).faults
    assert re.fullmatch(r".*:1: prompt: absolute aspect ratio must be smaller than 200, got 214\.2.*", str(fault))


def test_lengths_are_those_of_the_trainer(folder, measure, make):
    path = write(folder, [row(), row("Where is <image> in <image>?", image=["a.png", "b.png"]), row("1?", image=None)])
    samples = load_samples([path], [folder / "images"], question="{question}", check_images=False)
    findings = check_data([path], [folder / "images"], measure=measure)
    assert findings.lengths == [len(make.builder(sample).input_ids) for sample in samples]
    assert findings.faults == []


def run(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run_command(parser.parse_args(["check", *map(str, words)]), [])


def test_the_command_prints_each_fault(folder, capsys):
    path = write(folder, [row(), row(image="none.png"), row(gpt="x")])
    status = run(path, "--images", folder / "images", "--reward_funcs", "accuracy")
    assert status == 1
    missing, solution, total = capsys.readouterr().out.splitlines()
    assert missing == f"{path}:2: missing image: image none.png is missing in {folder}/images"
    assert solution.startswith(f"{path}:3: solution: the solution has no box")
    assert total == "3 rows, 1 images: 2 faults (1 missing image, 1 solution)"


def test_the_command_counts_tokens(folder, capsys):
    path = write(folder, [row(), row(), row("1 + 1?", image=None)])
    assert run(path, "--images", folder / "images", "--model", "tiny", "--question_template", "rec") == 0
    first, *bars, last = capsys.readouterr().out.splitlines()
    assert (first, last) == ("tokens a prompt:", "3 rows, 1 images: no faults")
    assert [int(bar.split()[-1]) for bar in bars if bar.split()[-1] != "0"] == [1, 2]


# The rows of the recipes


STANDINS = Path(__file__).parents[2] / "data" / "standins"
RECIPES = Path(__file__).parents[3] / "vlmr1" / "recipes"


def command(path, *more):
    return main(["data", "check", *map(str, path), "--images", str(STANDINS / "images"), *more])


def settings_of(recipe):
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())


@pytest.mark.parametrize("recipe", sorted(path.stem for path in STANDINS.glob("*.jsonl")))
def test_rows_of_a_recipe(recipe, capsys):
    settings = settings_of(recipe)
    words = ["--reward_funcs", *settings["reward_funcs"], "--question_template", settings["question_template"]]
    words += ["--accu_reward_method", *settings.get("accu_reward_method", ["iou"])]
    status = command([STANDINS / f"{recipe}.jsonl"], *words, "--reward_mode", settings.get("reward_mode", "strict"))
    assert status == 0, capsys.readouterr().out


def test_a_method_for_each_file(capsys):
    files = [STANDINS / "rec-3b.jsonl", STANDINS / "ovd-3b.jsonl"]
    words = ["--reward_funcs", "accuracy", "--accu_reward_method"]
    assert command(files, *words, "iou:odLength") == command(files, *words, "iou", "odLength") == 0
    assert command(files, *words, "odLength:iou") == command(files, *words, "iou") == 1
    assert command(files[1:], *words, "llm") == 0  # the judge is not asked
    capsys.readouterr()
    assert command(files, *words, "iou", "map", "mcq") == 2
    assert "accu_reward_method has 3 methods for 2 data files" in capsys.readouterr().err


def test_the_mode_decides(tmp_path, capsys):
    """The published code reads a box without area, and needs the tags."""
    path = tmp_path / "rows.jsonl"
    shared = {"image": sorted(path.name for path in (STANDINS / "images").iterdir())[0], "prompt": "<image>?"}
    for solution, strict in (("<answer>[30, 40, 1, 2]</answer>", 1), ("[1, 2, 30, 40]", 0)):
        path.write_text(json.dumps(shared | {"solution": solution}))
        assert command([path], "--reward_funcs", "accuracy") == strict
        assert command([path], "--reward_funcs", "accuracy", "--reward_mode", "vlm_r1") == 1 - strict
