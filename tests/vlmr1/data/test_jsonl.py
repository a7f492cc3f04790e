"""JSONL files -> samples: what a row becomes, and the message of every fault."""

import json

import numpy as np
import pytest
from PIL import Image

from vlmr1.data.images import open_image
from vlmr1.data.samples import load_samples
from vlmr1.errors import DataError, SettingError

QUESTION = "{question} Answer in JSON."
IMAGE, TEXT = {"type": "image"}, "text"
TURN, GPT = {"from": "human", "value": "And then?"}, {"from": "gpt", "value": "x"}


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    pixels = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
    for name in ("a.png", "sub/b.png", "../outside.png"):
        Image.fromarray(pixels).save(images / name)
    return tmp_path


def row(human: object = "<image>Locate it.", gpt="<answer>[0, 0, 4, 4]</answer>", **columns):
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"image": "a.png", "conversations": turns} | columns


def load(folder, *lines, question=QUESTION, check_images=True):
    """The samples of a file with these lines: text, bytes, or rows."""
    encoded = [line if isinstance(line, bytes | str) else json.dumps(line) for line in lines]
    data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in encoded)
    (folder / "data.jsonl").write_bytes(data)
    return load_samples([folder / "data.jsonl"], [folder / "images"], question=question, check_images=check_images)


def shown(message):
    """A message's text parts, with I in place of an image."""
    return ["I" if part == IMAGE else part["text"] for part in message["content"]]


def fault(folder, *lines, **options):
    with pytest.raises(DataError) as caught:
        load(folder, *lines, **options)
    return str(caught.value)


def test_row(folder):
    (sample,) = load(folder, row(id=7, dataset="refcoco"))
    assert sample.messages == [
        {"role": "user", "content": [IMAGE, {"type": TEXT, "text": "Locate it. Answer in JSON."}]}
    ]
    assert sample.images == ((folder / "images" / "a.png").resolve(),)
    assert sample.solution == "<answer>[0, 0, 4, 4]</answer>"
    assert (sample.source, sample.index) == (f"{folder}/data.jsonl:1", 0)
    assert sample.columns == {"id": 7, "dataset": "refcoco"}


@pytest.mark.parametrize(
    "human, images, expected",
    [
        pytest.param("<image>\nWhere?", ["a.png"], ["I", "Where? Answer in JSON."], id="leading"),
        pytest.param("Where?", ["a.png", "sub/b.png"], ["I", "I", "Where? Answer in JSON."], id="no-markers"),
        pytest.param("<image><image>Which?", ["a.png"] * 2, ["I", "I", "Which? Answer in JSON."], id="two"),
        pytest.param(
            "Is <image> in <image>?",
            ["a.png", "sub/b.png"],
            ["Is ", "I", " in ", "I", "? Answer in JSON."],
            id="inside",
        ),
        pytest.param("1 + {1}?", None, ["1 + {1}? Answer in JSON."], id="text-only-with-braces"),
        pytest.param("1 + 1?", [], ["1 + 1? Answer in JSON."], id="empty-list"),
        pytest.param("Where is {question}?", "a.png", ["I", "Where is {question}? Answer in JSON."], id="braces"),
    ],
)
def test_images_keep_their_places(folder, human, images, expected):
    (sample,) = load(folder, row(human, image=images))
    content = shown(sample.messages[0])
    assert content == expected
    named = [images] if isinstance(images, str) else images or []
    assert sample.images == tuple((folder / "images" / name).resolve() for name in named)


def test_images_stand_before_a_template_that_begins_with_text(folder):
    (sample,) = load(folder, row("<image>Where?"), question="Look. {question}")
    assert sample.messages[0]["content"] == [IMAGE, {"type": TEXT, "text": "Look. Where?"}]


def test_blank_lines_and_bom_keep_line_numbers(folder):
    samples = load(folder, b"\xef\xbb\xbf" + json.dumps(row()).encode(), "", "  ", row("Encore: où?"))
    assert [sample.source.rpartition(":")[2] for sample in samples] == ["1", "4"]
    assert [sample.index for sample in samples] == [0, 1]
    assert samples[1].messages[0]["content"][1]["text"] == "Encore: où? Answer in JSON."


def test_the_last_gpt_turn_is_the_solution_and_images_keep_their_places_in_all_turns(folder):
    turns = [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": " A cat, as in <image>. "},
        {"from": "human", "value": "Between it and <image>, where? "},
        {"from": "gpt", "value": {"bbox_2d": [1, 2, 3, 4]}},
    ]
    (sample,) = load(folder, row(conversations=turns, image=["a.png", "sub/b.png", "a.png"]))
    assert sample.solution == '{"bbox_2d": [1, 2, 3, 4]}'
    assert [(each["role"], shown(each)) for each in sample.messages] == [
        ("user", ["I", "What is this?"]),
        ("assistant", ["A cat, as in ", "I", "."]),
        ("user", ["Between it and ", "I", ", where? Answer in JSON."]),
    ]
    assert [path.name for path in sample.images] == ["a.png", "b.png", "a.png"]


def test_images_without_markers_stand_before_the_first_turn(folder):
    turns = [
        {"from": "human", "value": "This."},
        {"from": "gpt", "value": "Yes?"},
        {"from": "human", "value": "Where?"},
    ]
    (sample,) = load(folder, row(conversations=[*turns, {"from": "gpt", "value": "x"}]))
    assert [shown(each) for each in sample.messages] == [["I", "This."], ["Yes?"], ["Where? Answer in JSON."]]


@pytest.mark.parametrize("split", [list, lambda names: [":".join(names)]], ids=["list", "joined"])
def test_several_files_and_folders(folder, split):
    (folder / "more").mkdir()
    Image.new("L", (5, 5)).save(folder / "more" / "c.png")
    for name, image in (("one", "a.png"), ("two", "c.png")):
        (folder / f"{name}.jsonl").write_text(json.dumps(row(image=image)) + "\n")
    files = [str(folder / "one.jsonl"), str(folder / "two.jsonl")]
    folders = [str(folder / "images"), str(folder / "more")]
    samples = load_samples(split(files), split(folders), question=QUESTION, check_images=True)
    assert [sample.images[0].name for sample in samples] == ["a.png", "c.png"]
    assert [(sample.source, sample.index) for sample in samples] == [(f"{files[0]}:1", 0), (f"{files[1]}:1", 1)]


@pytest.mark.parametrize(
    "line, expected",
    [
        pytest.param("[" * 100_000, "not JSON", id="nested-too-deep"),
        pytest.param("null", "not a JSON object but null", id="null"),
        pytest.param(row(conversations=[]), "no conversations", id="no-turns"),
        pytest.param(row(conversations="Locate it."), "no conversations", id="conversations-a-text"),
        pytest.param(row(gpt=None), "no gpt turn at the end", id="gpt-null"),
        pytest.param(
            row(conversations=[TURN, GPT, TURN]),
            "no gpt turn at the end of conversations: it is the solution",
            id="human-last",
        ),
        pytest.param(row(conversations=[TURN, GPT, GPT]), "no human turn before the last gpt turn", id="gpt-twice"),
        pytest.param(
            row(conversations=[{"from": "human", "value": " "}, GPT, TURN, GPT], image=None),
            "a turn of user is empty",
            id="empty-turn",
        ),
        pytest.param(row(image=None), "1 <image> markers in the prompt for 0 images", id="marker-no-image"),
        pytest.param(row(image=["a.png", 3]), "image is neither a file name nor a list of", id="image-a-number"),
        pytest.param(row(image={"size": 3}), "image is neither a file name nor a list", id="image-a-dict"),
        pytest.param(row(image=0), "image is neither a file name nor a list", id="image-zero"),
        pytest.param(row(image=""), "image  is missing in", id="empty-name"),
        pytest.param(row(image="sub"), "image sub is missing in", id="a-folder"),
        pytest.param(
            row(image="../images2/a.png"), "image ../images2/a.png leaves the image folder", id="dots-same-prefix"
        ),
        pytest.param(row(image="/etc/hostname"), "image /etc/hostname leaves the image folder", id="absolute"),
    ],
)
def test_faults_name_file_and_line(folder, line, expected):
    message = fault(folder, row(), "", line, row())
    assert message.startswith(f"{folder}/data.jsonl:3: {expected}")


def test_a_symlink_may_not_leave_the_folder(folder):
    (folder / "images" / "out.png").symlink_to(folder / "outside.png")
    (folder / "images" / "in.png").symlink_to(folder / "images" / "sub" / "b.png")
    (folder / "images" / "parent").symlink_to(folder)
    assert len(load(folder, row(image="in.png"))) == 1
    for name in ("out.png", "parent/outside.png"):
        assert fault(folder, row(), row(image=name)) == (
            f"{folder}/data.jsonl:2: image {name} leaves the image folder {folder}/images; "
            "images_outside_folders=true allows it"
        )


def test_the_folder_itself_may_be_a_symlink(folder):
    (folder / "link").symlink_to(folder / "images")
    (folder / "data.jsonl").write_text(json.dumps(row()))
    (sample,) = load_samples([folder / "data.jsonl"], [folder / "link"], question=QUESTION, check_images=True)
    assert sample.images[0].is_file()


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_truncated_image(folder, extension):
    path = folder / "images" / f"cut.{extension}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1500])
    lines = [row(), row(image=path.name), row(image=path.name)]
    assert fault(folder, *lines).startswith(f"{folder}/data.jsonl:2: image {path} cannot be decoded: ")
    assert len(load(folder, *lines, check_images=False)) == 3


def test_each_image_is_checked_once(folder, monkeypatch):
    opened = []
    real = open_image
    monkeypatch.setattr(
        "vlmr1.data.images.open_image",
        lambda path, source: opened.append((path.name, source[-1])) or real(path, source),
    )
    load(folder, row(), row(), row(image="sub/../a.png"), row(image="sub/b.png"))
    assert sorted(opened) == [("a.png", "1"), ("b.png", "4")]


@pytest.mark.parametrize("content", ["", "\n \n"], ids=["no-bytes", "blank-lines"])
def test_empty_data_set(folder, content):
    assert fault(folder, content) == f"{folder}/data.jsonl: the data set is empty: no rows in this file"


def test_a_name_with_a_colon_is_one_file(folder):
    (folder / "a:b.jsonl").write_text(json.dumps(row()))
    (sample,) = load_samples([folder / "a:b.jsonl"], [folder / "images"], question=QUESTION, check_images=False)
    assert sample.source == f"{folder}/a:b.jsonl:1"


@pytest.mark.parametrize(
    "files, folders, expected",
    [
        ([], ["images"], "data_file_paths is empty"),
        (["images"], ["images"], "data_file_paths: images is not a file"),
        (["data.jsonl:none.jsonl"], ["images"], "data_file_paths: none.jsonl is not a file"),
        (["data.jsonl"], ["images:none"], "image_folders has 2 folders for 1 data files"),
        (["data.jsonl"] * 3, ["images"] * 2, "image_folders has 2 folders for 3 data files"),
    ],
)
def test_settings(folder, monkeypatch, files, folders, expected):
    monkeypatch.chdir(folder)
    (folder / "data.jsonl").write_text(json.dumps(row()))
    with pytest.raises(SettingError) as caught:
        load_samples(files, folders, question=QUESTION, check_images=False)
    assert str(caught.value).startswith(expected)
