"""Rows of every format -> samples: the docs' table, the peers' files, and what each conversion makes or refuses."""

import base64
import json
import re
from decimal import Decimal
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from tests.data.formats import make
from tests.vlmr1.data.test_prompts_of_rows import encoded, shown
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
PNG = encoded((1, 2, 3))
BASE64 = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{BASE64}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), (7, 8, 9)).save(tmp_path / name)
    return tmp_path


def sample(folder, row, columns=DEFAULT, question="{question}"):
    return Samples([(ListRows("rows", [row]), ImageFolder(folder))], question, columns)[0]


def fault(folder, row, columns=DEFAULT):
    with pytest.raises(DataError) as caught:
        sample(folder, row, columns)
    assert str(caught.value).startswith("rows:1: ")
    return caught.value.kind, str(caught.value)


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
    settings = {
        "data_file_paths": PEERS / name,
        "image_folders": IMAGES,
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "prompts_per_device": 2,
        "num_generations": 2,
        "max_completion_length": 6,
        "temperature": 3.0,
        "warmup_steps": 0,
        "write_report": "false",
        "use_cpu": "true",
    }
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    rewards = ["--reward_funcs", f"{tmp_path / 'mine.py'}:mine", "accuracy"]
    assert main(["train", "--recipe", "tiny-digits", *words, *rewards]) == 0
    assert f"{COUNTS[name]} of {COUNTS[name]} rows have images\n" in capsys.readouterr().out
    steps = read_metrics(tmp_path / "out")
    assert len(steps) == 3 and all(torch.isfinite(torch.tensor(step["loss"])) for step in steps)
    assert any(step["grad_norm"] > 0 for step in steps)


# Conversions


def said(role, content):
    return {"role": role, "content": content}


def parts(*values):
    """Parts of a message: text, or an image part."""
    return [{"type": "text", "text": value} if isinstance(value, str) else value for value in values]


def of_parts(*values):
    """A row whose prompt has these parts."""
    return {"prompt": [said("user", parts(*values))], "solution": "x"}


def about(objects, question="Q", answer="x"):
    """A row with grounding placeholders."""
    return {"messages": [said("user", question), said("assistant", answer)], "objects": objects}


IMAGE, A, BOTH = {"type": "image"}, {"image": "a.jpg"}, {"images": ["a.jpg", "b.jpg"]}
HERE = IMAGE | A
ASK, ANSWER = said("user", "Q"), said("assistant", "x")
HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "x"}
PROMPT, SAID = {"prompt": "Q", "solution": "x"}, [("user", ["Q"])]
CUP = {"ref": ["cup"], "bbox": [[1, 2.5, 3, 4]]}
TWO = [[1, 2, 3, 4], [5, 6, 7, 8]]


def labelled(*labels):
    return json.dumps([{"bbox_2d": box, "label": label} for box, label in zip(TWO, labels, strict=True)])


CONVERSIONS = {
    "turns of both kinds": (
        {"conversations": [{"from": "system", "value": "S"}, HUMAN, ANSWER]},
        [("system", ["S"]), *SAID],
        ("x",),
    ),
    "unused keys are null": ({"messages": [HUMAN | {"role": None}, ANSWER | {"value": None}]}, SAID, ("x",)),
    "system column": ({"messages": [ASK, ANSWER], "system": "S"}, [("system", ["S"]), *SAID], ("x",)),
    "a system turn wins": (
        {"messages": [said("system", "T"), ASK, ANSWER], "system": "S"},
        [("system", ["T"]), *SAID],
        ("x",),
    ),
    "a solution beside an answer": ({"messages": [ASK, ANSWER], "solution": 5}, SAID, ("5",)),
    "a solution beside a gpt turn": ({"conversations": [HUMAN, GPT], "solution": "y"}, SAID, ("y",)),
    "an answer of parts": ({"messages": [ASK, said("assistant", parts("x", "y"))]}, SAID, ("xy",)),
    "an answer in JSON": ({"messages": [ASK, said("assistant", {"a": 1})]}, SAID, ('{"a": 1}',)),
    "several solutions": (PROMPT | {"solution": ["a", "b", "a"]}, SAID, ("a", "b")),
    "several answers of a turn": ({"conversations": [HUMAN, GPT | {"value": ["a", "b"]}]}, SAID, ("a", "b")),
    "texts and numbers": (PROMPT | {"solution": [5, "five"]}, SAID, ("5", "five")),
    "a box": (PROMPT | {"solution": [1, 2, 3, 4]}, SAID, ("[1, 2, 3, 4]",)),
    "prompt before messages": (PROMPT | {"messages": [ANSWER]}, SAID, ("x",)),
    "history": (
        {"query": "R", "response": "y", "history": [["Q", "x"]]},
        [*SAID, ("assistant", ["x"]), ("user", ["R"])],
        ("y",),
    ),
    "markers in parts": (of_parts("<image>Q <image>") | BOTH, [("user", ["I", "Q ", "I"])], ("x",)),
    "images of parts and of the column": (of_parts(HERE, "Q", IMAGE) | A, [("user", ["I", "Q", "I"])], ("x",)),
    "objects of a caption": (
        about(CUP, "<image>Q", "Near <ref-object> at <bbox>") | A,
        [("user", ["I", "Q"])],
        ("Near cup at [1, 2.5, 3, 4]",),
    ),
    "objects of a detection": (
        about({"ref": ["cup"], "bbox": TWO}, "Find <ref-object>", "<bbox><bbox>"),
        [("user", ["Find cup"])],
        (labelled("cup", "cup"),),
    ),
    "objects with names": (
        about({"ref": ["cup", "pan"], "bbox": TWO}, answer="<ref-object><bbox>, <ref-object><bbox>"),
        SAID,
        (labelled("cup", "pan"),),
    ),
    "objects in order": (
        about({"ref": ["cup", "pan"], "bbox": TWO[:1]}, answer="No <ref-object>; <ref-object><bbox>"),
        SAID,
        ('No cup; [{"bbox_2d": [1, 2, 3, 4], "label": "pan"}]',),
    ),
    "objects of the question": (about(CUP, "In <bbox>?"), [("user", ["In [1, 2.5, 3, 4]?"])], ("x",)),
    "objects in shares of another image": (
        about({"bbox": [[0.5, 0.5, 1, 1]], "bbox_type": "norm1", "image_id": [1]}, answer="<bbox>") | BOTH,
        [("user", ["I", "I", "Q"])],
        ("[20.0, 15.0, 40, 30]",),
    ),
    "<bbox> as a word": (PROMPT | {"prompt": "As <bbox>?"}, [("user", ["As <bbox>?"])], ("x",)),
    "objects of a table": (about({"ref": None, "bbox": None}, "As <bbox>?"), [("user", ["As <bbox>?"])], ("x",)),
}


@pytest.mark.parametrize("row, messages, solutions", CONVERSIONS.values(), ids=CONVERSIONS)
def test_conversions(folder, row, messages, solutions):
    made = sample(folder, row)
    assert shown(made) == messages
    assert (made.solution, *made.other_solutions) == solutions
    assert len(made.images) == sum(part == "I" for _, content in messages for part in content)


def test_images_are_in_the_order_of_their_places(folder):
    row = of_parts(IMAGE, "Q", HERE) | {"image": "b.jpg"}
    assert [image.name for image in sample(folder, row).images] == ["b.jpg", "a.jpg"]


def test_columns_and_system_prompt(folder):
    row = {"question": "Q", "reward_model": {"answer": {"text": "x"}}, "media": {"picture": "a.jpg"}, "answer": "y"}
    made = sample(folder, row, Columns("question", "reward_model.answer.text", "media.picture", "S"))
    assert shown(made) == [("system", ["S"]), ("user", ["I", "Q"])]
    assert (made.solution, [image.name for image in made.images]) == ("x", ["a.jpg"])
    assert made.columns == {name: row[name] for name in ("reward_model", "media", "answer")}
    assert shown(sample(folder, {"messages": [said("system", "T"), ASK, ANSWER]}, Columns(system_prompt="S")))[0][
        1
    ] == ["T"]


REFUSED = {
    "no format": ({"text": "a"}, "conversations", "'text'"),
    "no solution": ({"query": "Q", "answers": "x"}, "solution", "'answers'"),
    "another solution column": ({"problem": "Q", "answer": "x"}, "solution", "'gt'", Columns(solution="gt")),
    "tool turn": ({"messages": [said("tool", "a"), ANSWER]}, "turn", "tool"),
    "no answer": ({"messages": [ASK]}, "solution", "assistant"),
    "answer to an answer": ({"messages": [ASK, ANSWER, ANSWER]}, "turn", "user"),
    "empty gpt turn": ({"conversations": [HUMAN, GPT | {"value": " \n"}]}, "solution", "empty"),
    "empty answer": ({"messages": [ASK, said("assistant", [])], "solution": ""}, "solution", "empty"),
    "empty among several": (PROMPT | {"solution": ["a", ""]}, "solution", "empty"),
    "null among several": (PROMPT | {"solution": ["a", None]}, "solution", "empty"),
    "solution of another type": (PROMPT | {"solution": Decimal(1)}, "solution", "Decimal"),
    "solution of bytes": (PROMPT | {"solution": b"x"}, "solution", "bytes"),
    "prompt of bytes": (PROMPT | {"prompt": b"Q"}, "prompt", "Q"),
    "history of texts": ({"query": "R", "response": "y", "history": ["Q"]}, "turn", "history"),
    "system of numbers": ({"query": "R", "response": "y", "system": 5}, "turn", "system"),
    "images of parts, and unmarked": (of_parts(HERE, "Q") | A, "markers", "column"),
    "marker in a part": (of_parts(IMAGE, "<image>") | A, "markers", "2 <image>"),
    "unknown key of a part": (of_parts(HERE | {"max_pixels": 9}), "turn", "max_pixels"),
    "number as a part's image": (of_parts(IMAGE | {"image": 5}), "image name", "5"),
    "too few boxes": (about(CUP, answer="<bbox><bbox>"), "objects", "2 <bbox>"),
    "boxes left": (about({"bbox": [[1, 2], [3, 4]]}, "<bbox>"), "objects", "2 bbox"),
    "names without objects": (about(None, "<ref-object>?"), "objects", "ref"),
    "box of three": (about({"bbox": [[1, 2, 3]]}, "<bbox>"), "objects", "bbox"),
    "unit of boxes": (about({"bbox": [[1, 2]], "bbox_type": "norm1000"}, "<bbox>"), "objects", "norm1000"),
    "image of a box": (about({"bbox": [[1, 2]], "bbox_type": "norm1"}, "<bbox>"), "objects", "image_id"),
    "videos": (PROMPT | {"videos": ["a.mp4"]}, "video", "videos"),
    "video": (PROMPT | A | {"video": {"path": "a.mp4"}}, "video", "video"),
    "sound": (PROMPT | {"audios": ["a.mp3"]}, "video", "audios"),
    "video marker": ({"query": "<video>What?", "response": "x"}, "video", "<video>"),
    "video part": (of_parts({"type": "video", "video": "a.mp4"}), "video", "video"),
    "video by its address": (of_parts({"type": "video_url", "video_url": {"url": "a.mp4"}}), "video", "video_url"),
    "part of another kind": (of_parts({"type": "document", "text": "a"}), "turn", "document"),
    "Qwen's token": (PROMPT | A | {"prompt": "<|vision_start|><|image_pad|>Q"}, "image token", "<|vision_start|>"),
    "InternVL's token": (PROMPT | A | {"prompt": "<IMG_CONTEXT>Q"}, "image token", "<IMG_CONTEXT>"),
    "GLM's token": (
        {"messages": [said("system", parts("<|begin_of_image|>")), ASK, ANSWER]},
        "image token",
        "<|begin_of_image|>",
    ),
    "image_path": (PROMPT | {"image_path": "a"}, "unread image", "image_path"),
    "img": (PROMPT | {"img": [{"path": "a"}]}, "unread image", "img"),
    "picture": (PROMPT | {"Picture": "x y"}, "unread image", "Picture"),
    "bytes": (PROMPT | {"scene": {"bytes": PNG}}, "unread image", "scene"),
    "a name in any column": (PROMPT | {"source": ["b/A.JPG "]}, "unread image", "source"),
    "base64 in any column": (PROMPT | {"payload": BASE64}, "unread image", "payload"),
    "URL": (PROMPT | {"image": "https://example.com/a.jpg"}, "image url", "not fetched"),
    "bucket": (PROMPT | {"images": [{"bytes": None, "path": "s3://bucket/a.jpg"}]}, "image url", "s3://bucket"),
    "URL in a part": (
        of_parts({"type": "image_url", "image_url": {"url": "http://a.b/c.png"}}),
        "image url",
        "http://a.b",
    ),
    "URI of a text": (PROMPT | {"image": "data:text/plain;base64,AAAA"}, "image name", "data:text"),
    "cut base64": (PROMPT | {"image": URI[:-3]}, "image undecodable", "base64"),
    "an empty dict": (PROMPT | {"image": {}}, "image name", "{}"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_rows(folder, case):
    row, kind, word, *columns = case
    found, message = fault(folder, row, *columns)
    assert (found, word in message) == (kind, True), message


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
