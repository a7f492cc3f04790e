"""Hugging Face data sets as rows: saved directories, Parquet with image bytes, and what cannot be read."""

import pickle
import sys
from datetime import date
from decimal import Decimal

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tests.helpers.pictures import encoded
from tests.helpers.rows import row, shown
from vlmr1.data.folder import ImageFolder
from vlmr1.data.hub import DatasetRows
from vlmr1.data.images import open_image
from vlmr1.data.samples import Samples, load_samples, validation_split
from vlmr1.data.sources import open_rows
from vlmr1.errors import DataError, SettingError
from vlmr1.types import ImageBytes

COLOURS = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def load(name, folders=(), **options):
    return load_samples([name], folders, question="{question}", check_images=True, **options)


def colours(samples):
    return [open_image(image, "").getpixel((0, 0)) for sample in samples for image in sample.images]


def table(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.fixture(scope="module")
def made():
    """Three rows with the image feature of datasets."""
    images = [Image.new("RGB", (40, 30), colour) for colour in COLOURS]
    rows = {"image": images, "prompt": ["Where?"] * 3, "solution": ["a", "b", "c"]}
    text = datasets.Value("string")
    return datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image(), prompt=text, solution=text))


def test_a_saved_directory(tmp_path, made):
    path = tmp_path / "saved"
    made.save_to_disk(path)
    samples = load(path)
    assert [sample.source for sample in samples] == [f"{path}:{i}" for i in (1, 2, 3)]
    assert [sample.solution for sample in samples] == ["a", "b", "c"]
    assert shown(samples[0]) == [("user", ["I", "Where?"])]
    assert colours(samples) == COLOURS
    with pytest.raises(SettingError, match=r"saved is a single data set, it has no split 'train'$"):
        load(f"{path}@train")


def test_splits_of_a_saved_directory(tmp_path, made):
    datasets.DatasetDict({"train": made.select([0, 1]), "test": made.select([2])}).save_to_disk(tmp_path / "saved")
    samples = load(f"{tmp_path}/saved@test")
    assert colours(samples) == COLOURS[2:] and samples[0].source == f"{tmp_path}/saved@test:1"
    for name in ("saved", "saved@validation"):
        with pytest.raises(SettingError, match=r"name a split of .*/saved, .*/saved@SPLIT: one of train, test$"):
            load(f"{tmp_path}/{name}")
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "one")  # which needs no name
    assert colours(load(tmp_path / "one")) == COLOURS


@pytest.fixture
def parquet(tmp_path):
    """VLM-R1's rows as a table: images as structs of bytes and path, one row with two, one without any."""
    structs = [{"bytes": encoded(colour=colour), "path": f"{i}.png"} for i, colour in enumerate(COLOURS)]
    said = [("<image>Where?", "answer 0"), ("1 + 1?", "2"), ("<image> or <image>?", "the first")]
    turns = [row(*each)["conversations"] for each in said]
    rows = {"images": [structs[:1], None, structs[1:]], "conversations": turns, "source": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_parquet_with_image_bytes(parquet):
    samples = load(parquet)
    assert [len(sample.images) for sample in samples] == [1, 0, 2]
    assert colours(samples) == COLOURS
    assert [str(image) for sample in samples for image in sample.images] == ["0.png", "1.png", "2.png"]
    assert [sample.solution for sample in samples] == ["answer 0", "2", "the first"]
    assert shown(samples[2]) == [("user", ["I", "or ", "I", "?"])]
    assert samples[1].columns == {"source": "b"}


def test_equal_images_of_two_rows_are_one(tmp_path):
    image = {"bytes": encoded(), "path": None}
    path = table(tmp_path / "rows.parquet", image=[image] * 2, prompt=["a", "b"], solution=["x", "y"])
    one, two = load(path)
    assert one.images == two.images
    assert [image.name for each in (one, two) for image in each.images] == [f"1 of {path}:{i}" for i in (1, 2)]


def test_a_table_travels_to_a_worker_and_is_split(parquet):
    samples = pickle.loads(pickle.dumps(load(parquet)))
    assert colours(samples) == COLOURS
    train, validation = validation_split(samples, 0.3, 0)
    assert sorted(sample.index for part in (train, validation) for sample in part) == [0, 1, 2]


def test_a_broken_image_names_its_row(tmp_path):
    images = [{"bytes": data, "path": "x.png"} for data in (encoded(), encoded()[:-30])]
    path = table(tmp_path / "rows.parquet", image=images, prompt=["a"] * 2, solution=["x"] * 2)
    with pytest.raises(DataError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:2: image x.png cannot be decoded: ")


MIXED = {
    "decimals": ({"solution": [Decimal(1)]}, ":1: the solution is neither text nor a JSON value: .*Decimal"),
    "dates": ({"solution": [date(2020, 1, 1)]}, ":1: the solution is neither text nor a JSON value: .*date"),
    "bytes as text": ({"prompt": pyarrow.array([b"a"])}, ":1: the prompt is neither text nor a list of messages but"),
    "numbers as images": ({"image": [[1, 2]]}, ":1: image is neither a file name nor .*, but 1"),
    "text in no encoding": (
        {"prompt": pyarrow.StringArray.from_buffers(1, *pyarrow.array([b"\xff"]).buffers()[1:])},
        ":1: the row cannot be read: .*utf-8",
    ),
}


@pytest.mark.parametrize("columns, expected", MIXED.values(), ids=MIXED)
def test_columns_of_other_types(tmp_path, columns, expected):
    path = table(tmp_path / "rows.parquet", **{"prompt": ["a"], "solution": ["x"]} | columns)
    with pytest.raises(DataError, match=rf"rows\.parquet{expected}"):
        load(path)


def test_a_column_of_two_types_is_named(tmp_path):
    """The files of a directory differ: a text and a number."""
    datasets.Dataset.from_dict({"prompt": ["a"] * 2, "solution": ["x"] * 2}).save_to_disk(tmp_path / "a", num_shards=2)
    datasets.Dataset.from_dict({"prompt": ["a"], "solution": [3]}).save_to_disk(tmp_path / "b")
    (other,) = (tmp_path / "b").glob("*.arrow")
    other.rename(tmp_path / "a" / "data-00001-of-00002.arrow")
    with pytest.raises(SettingError, match=r"/a cannot be read: .*solution has incompatible types: string vs int64$"):
        load(tmp_path / "a")


def test_a_column_twice(tmp_path):
    path, names = tmp_path / "rows.parquet", ["prompt", "prompt", "solution"]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names=names), path)
    with pytest.raises(SettingError, match=r"rows\.parquet cannot be read: Multiple matches .*prompt"):
        load(path)


def test_file_names_in_a_table(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded())
    (sample,) = load(table(tmp_path / "rows.parquet", image=["a.png"], prompt=["a"], solution=["x"]), [tmp_path])
    assert sample.images == (tmp_path / "a.png",)


def test_in_memory_data_sets_keep_their_bytes(made):
    samples = Samples([(DatasetRows("mine", made), ImageFolder(None))], "{question}")
    assert colours(samples) == COLOURS
    assert all(isinstance(sample.images[0], ImageBytes) for sample in samples)
    assert np.asarray(open_image(samples[0].images[0], "")).shape == (30, 40, 3)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("broken.parquet", "data_file_paths: {folder}/broken.parquet cannot be read: "),
        ("nothing@train", "data_file_paths: {folder}/nothing@train is not a file, nor a directory of save_to_disk"),
        ("empty", "data_file_paths: {folder}/empty is not a file, nor a directory of save_to_disk"),
    ],
)
def test_unreadable(tmp_path, name, expected):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError) as caught:
        open_rows(f"{tmp_path}/{name}")
    assert str(caught.value).startswith(expected.format(folder=tmp_path))


def test_a_hub_name_asks_for_its_split(monkeypatch, made):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    samples = load("owner/name@train[:3]:owner/other@test")
    assert asked == [(("owner/name",), {"split": "train[:3]"}), (("owner/other",), {"split": "test"})]
    assert [samples[i].source for i in (2, 3)] == ["owner/name@train[:3]:3", "owner/other@test:1"]


def test_a_missing_package_is_named(monkeypatch, parquet):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SettingError, match=r"rows\.parquet needs datasets: pip install 'vlmr1\[data\]'$"):
        load(parquet)
