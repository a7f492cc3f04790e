"""Rows of every format -> samples: the docs' table, the peers' files, and what each conversion makes or refuses."""

import json
import re
from decimal import Decimal
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from tests.data.formats import make
from tests.helpers.digit_runs import command
from tests.helpers.pictures import encoded
from tests.helpers.rows import shown
from vlmr1.cli import main
from vlmr1.config import GRPOConfig
from vlmr1.data.folder import ImageFolder
from vlmr1.data.formats import DEFAULT, FORMATS, Columns
from vlmr1.data.images import upright_size
from vlmr1.data.rows import ListRows
from vlmr1.data.samples import Samples, load_samples
from vlmr1.errors import DataError
from vlmr1.evaluation.options import Options
from vlmr1.evaluation.rows import load_rows
from vlmr1.report.progress import read_metrics
from vlmr1.rewards.answer import solution_box
from vlmr1.rewards.rows import RowReader

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), (7, 8, 9)).save(tmp_path / "rows" / name)
    return tmp_path / "rows"


def sample(folder, row, columns=DEFAULT, question="{question}"):
    return Samples([(ListRows("rows", [row]), ImageFolder(folder))], question, columns)[0]


# The page


PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"(?:^|\. )([^.\n]+):\n\n```jsonl\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


def test_the_table_has_every_format_and_its_example():
    table = re.findall(r"^\| ([^|]+) \| `(\w+)`", PAGE.partition("## Rows")[2].partition("## Images")[0], re.MULTILINE)
    assert {prompt for _, prompt in table} == {each.prompt for each in FORMATS}
    assert [name for name, _ in table] == list(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_the_page(name, folder, capsys):
    assert EXAMPLES[name].count("\n") == 2
    for image in ("a.jpg", "b.jpg"):  # in which the boxes of the examples lie
        Image.new("RGB", (64, 48)).save(folder / image)
    (folder / "rows.jsonl").write_text(EXAMPLES[name])
    assert main(["data", "check", str(folder / "rows.jsonl"), "--images", str(folder)]) == 0, capsys.readouterr().out
    samples = load_samples([folder / "rows.jsonl"], [folder], question="{question}", check_images=True)
    assert any(each.images for each in samples) and all(each.solution for each in samples)
    with_images = sum(bool(each.images) for each in samples)
    assert f"{with_images} of 2 rows have images\n" in capsys.readouterr().out


# The peers' files


PEERS = ROOT / "tests" / "data" / "formats"
IMAGES = make.IMAGES
COUNTS = {"vlm-r1.jsonl": 2, "trl.jsonl": 5, "ms-swift.jsonl": 5, "llama-factory.json": 3}
COUNTS |= {"verl.parquet": 2, "easyr1.parquet": 2}


@pytest.mark.parametrize("name", make.FORMATS)
def test_a_peers_file(name, capsys):
    """Each row has one image and the box of what it asks for."""
    words = ["--reward_funcs", "accuracy", "--accu_reward_method", "iou", "--model", "tiny"]
    assert main(["data", "check", str(PEERS / name), "--images", str(IMAGES), *words]) == 0, capsys.readouterr().out
    assert f"{COUNTS[name]} of {COUNTS[name]} rows have images\n" in capsys.readouterr().out
    samples = load_samples([PEERS / name], [IMAGES], question="{question}", check_images=True)
    for each in samples:
        (image,) = each.images
        assert upright_size(image, "") == (151, 97)
        assert solution_box(each.solution) in [tuple(map(float, box)) for box in make.BOXES]
        text = each.messages[-1]["content"][-1]["text"]
        assert "rectangle" in text or text == "?"


@pytest.mark.slow
@pytest.mark.parametrize("name", make.FORMATS)
def test_three_steps_from_a_peers_file(name, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "def mine(completions, solution, **columns):\n"
        "    assert all(solution)\n    return [len(set(c[0]['content'])) / 10 for c in completions]\n"
    )
    files = {"data_file_paths": PEERS / name, "image_folders": IMAGES, "max_steps": 3, "temperature": 3.0}
    small = {"num_generations": 2, "max_completion_length": 6}
    rewards = ["--reward_funcs", f"{tmp_path / 'mine.py'}:mine", "accuracy"]
    assert main(command(tmp_path, tmp_path / "out", *rewards, **files, **small)) == 0
    assert f"{COUNTS[name]} of {COUNTS[name]} rows have images\n" in capsys.readouterr().out
    steps = read_metrics(tmp_path / "out")
    assert len(steps) == 3 and all(torch.isfinite(torch.tensor(step["loss"])) for step in steps)
    assert any(step["grad_norm"] > 0 for step in steps)


# Conversions


def cases(name):
    lines = (ROOT / "tests" / "data" / name).read_text(encoding="utf-8").splitlines()
    return [pytest.param(case, id=case["case"]) for case in map(json.loads, lines)]


@pytest.mark.parametrize("case", cases("row_conversions.jsonl"))
def test_conversions(folder, case):
    made = sample(folder, case["row"], question=case.get("question", "{question}"))
    assert shown(made) == [tuple(message) for message in case["messages"]]
    assert [made.solution, *made.other_solutions] == case["solutions"]
    assert list(made.images) == [next(folder.rglob(name)) for name in case.get("images", [])]
    assert made.columns == case.get("columns", made.columns)


def test_columns_and_system_prompt(folder):
    row = {"question": "Q", "reward_model": {"answer": {"text": "x"}}, "media": {"picture": "a.jpg"}, "answer": "y"}
    made = sample(folder, row, Columns("question", "reward_model.answer.text", "media.picture", "S"))
    assert shown(made) == [("system", ["S"]), ("user", ["I", "Q"])]
    assert (made.solution, [image.name for image in made.images]) == ("x", ["a.jpg"])
    assert made.columns == {name: row[name] for name in ("reward_model", "media", "answer")}
    row = {"messages": [{"role": role, "content": "T"} for role in ("system", "user", "assistant")]}
    assert shown(sample(folder, row, Columns(system_prompt="S"))) == [("system", ["T"]), ("user", ["T"])]
    row = {"problem": "Q", "answer": {"bbox_2d": [1, 2, 3, 4]}, "level": 3, "prompt": "not this"}
    made = sample(folder, row, Columns("problem", "answer"))
    assert (shown(made), json.loads(made.solution)) == ([("user", ["Q"])], row["answer"])
    assert made.columns == {"level": 3, "prompt": "not this"}


PROMPT, A = {"prompt": "Q", "solution": "x"}, {"image": "a.jpg"}
REFUSED = {  # that JSON cannot hold
    "solution of another type": ({"solution": Decimal(1)}, "solution", "Decimal"),
    "solution of bytes": ({"solution": b"x"}, "solution", "bytes"),
    "prompt of bytes": ({"prompt": b"Q"}, "prompt", "neither text nor a list of messages"),
    "bytes": ({"scene": {"bytes": encoded()}}, "unread image", "scene"),
    "open image": ({"image": Image.new("F", (9, 9), 7)}, "image undecodable", "image 1 of rows:1 cannot be read"),
}
IN_PYTHON = [
    pytest.param({"row": PROMPT | row, "kind": kind, "says": says}, id=name)
    for name, (row, kind, says) in REFUSED.items()
]


@pytest.mark.parametrize("case", [*cases("refused_rows.jsonl"), *IN_PYTHON])
def test_refused_rows(folder, case):
    with pytest.raises(DataError) as caught:
        sample(folder, case["row"], Columns(**case.get("columns", {})))
    message = str(caught.value)
    assert message.startswith("rows:1: ") and case["says"] in message, message
    assert caught.value.kind == case["kind"]


@pytest.mark.parametrize(
    "column",
    [
        {"image_size": [4, 5]},
        {"image_id": 7},
        {"image_grid_thw": [1, 2, 3]},
        {"images_per_row": "2"},
        {"image_path": None},
        {"img": []},
        {"videos": []},
        {"source": "photo.png was found"},
    ],
    ids=str,
)
def test_columns_that_are_no_images(folder, column):
    assert sample(folder, PROMPT | column).images == ()


def test_unread_columns_are_named_once_a_file(folder, capsys):
    for name in ("one", "two"):
        rows = [PROMPT | A | {"mask": "b.jpg", "n": 1}, PROMPT | A | {"mask": "b.jpg"}, PROMPT]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = [str(folder / f"{name}.jsonl") for name in ("one", "two")]
    assert main(["data", "check", *files, "--images", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == [
        *(f"{file}: column 'mask' looks like an image and is not read" for file in files),
        "4 of 6 rows have images",
        "6 rows, 1 images: no faults",
    ]


READ_AS = {
    "prompt_column": "problem",
    "solution_column": "reward_model.box",
    "image_column": "extra.picture",
    "system_prompt": "S",
    "images_outside_folders": True,
}


def test_settings_of_training_evaluation_and_the_check(folder, processor, capsys):
    (folder / "images").mkdir()
    path, images = str(folder / "rows.jsonl"), str(folder / "images")
    row = {"problem": "Q", "answer": "no", "reward_model": {"box": [1, 2, 30, 20]}, "extra": {"picture": "../a.jpg"}}
    Path(path).write_text(json.dumps(row | {"question": "not this"}))
    config = GRPOConfig(use_cpu=True, output_dir=str(folder / "out"), **READ_AS)
    (trained,) = RowReader.of(config, "qwen2_5_vl", processor.image_processor).read([path], [images])
    (evaluated,) = load_rows(Options("rec", (path,), (images,), **READ_AS), "qwen2_5_vl").samples
    for each in (trained, evaluated):
        assert (each.solution, each.images) == ("[1, 2, 30, 20]", (folder / "a.jpg",))
        assert each.messages[0] == {"role": "system", "content": [{"type": "text", "text": "S"}]}
    words = [word for name, value in READ_AS.items() for word in (f"--{name}", str(value).replace("True", "true"))]
    assert main(["data", "check", path, "--images", images, "--reward_funcs", "accuracy", *words]) == 0
    assert "1 of 1 rows have images\n" in capsys.readouterr().out
    assert main(["data", "check", path, "--images", images, *words[:-2]]) == 1
    assert f"{path}:1: image outside: " in capsys.readouterr().out
