"""JSONL files -> samples: what a row becomes, and the message of every fault."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.helpers.rows import BOX, row, shown, write
from vlmr1.data.images import open_image
from vlmr1.data.samples import load_samples
from vlmr1.errors import DataError, SettingError

QUESTION = "{question} Answer in JSON."


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    pixels = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
    for name in ("a.png", "sub/b.png", "../outside.png"):
        Image.fromarray(pixels).save(images / name)
    return tmp_path


def load(folder, *lines, question=QUESTION, check_images=True):
    """The samples of a file with these lines: text, bytes, or rows."""
    path = write(folder / "data.jsonl", *lines)
    return load_samples([path], [folder / "images"], question=question, check_images=check_images)


def fault(folder, *lines, **options):
    with pytest.raises(DataError) as caught:
        load(folder, *lines, **options)
    return str(caught.value)


def test_row(folder):
    (sample,) = load(folder, row(id=7, dataset="refcoco"))
    assert shown(sample) == [("user", ["I", "Where? Answer in JSON."])]
    assert sample.images == ((folder / "images" / "a.png").resolve(),)
    assert sample.solution == BOX
    assert (sample.source, sample.index) == (f"{folder}/data.jsonl:1", 0)
    assert sample.columns == {"id": 7, "dataset": "refcoco"}


def test_blank_lines_and_bom_keep_line_numbers(folder):
    samples = load(folder, b"\xef\xbb\xbf" + json.dumps(row()).encode(), "", "  ", row("Encore: où?"))
    assert [sample.source.rpartition(":")[2] for sample in samples] == ["1", "4"]
    assert [sample.index for sample in samples] == [0, 1]
    assert samples[1].messages[0]["content"][1]["text"] == "Encore: où? Answer in JSON."


@pytest.mark.parametrize("split", [list, lambda names: [":".join(names)]], ids=["list", "joined"])
def test_several_files_and_folders(folder, split):
    (folder / "more").mkdir()
    Image.new("L", (5, 5)).save(folder / "more" / "c.png")
    pairs = (("one", "a.png"), ("two", "c.png"))
    files = [str(write(folder / f"{name}.jsonl", row(image=image))) for name, image in pairs]
    folders = [str(folder / "images"), str(folder / "more")]
    samples = load_samples(split(files), split(folders), question=QUESTION, check_images=True)
    assert [sample.images[0].name for sample in samples] == ["a.png", "c.png"]
    assert [(sample.source, sample.index) for sample in samples] == [(f"{files[0]}:1", 0), (f"{files[1]}:1", 1)]


@pytest.mark.parametrize(
    "line, expected", [("[" * 100_000, "not JSON"), ("null", "not a JSON object but null")], ids=["nested", "null"]
)
def test_faults_name_file_and_line(folder, line, expected):
    assert fault(folder, row(), "", line, row()).startswith(f"{folder}/data.jsonl:3: {expected}")


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
    path = write(folder / "data.jsonl", row())
    (sample,) = load_samples([path], [folder / "link"], question=QUESTION, check_images=True)
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
    path = write(folder / "a:b.jsonl", row())
    (sample,) = load_samples([path], [folder / "images"], question=QUESTION, check_images=False)
    assert sample.source == f"{path}:1"


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
    write(folder / "data.jsonl", row())
    with pytest.raises(SettingError) as caught:
        load_samples(files, folders, question=QUESTION, check_images=False)
    assert str(caught.value).startswith(expected)
