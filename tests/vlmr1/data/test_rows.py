"""Rows that are read when they are asked for; what is held, and how they are split."""

import json
import os
import pickle
import tracemalloc

import pytest

from vlmr1.data.rows import ArrayRows, LineRows, json_rows
from vlmr1.data.samples import load_samples, validation_split
from vlmr1.errors import DataError, SettingError


def line(i, **columns):
    return json.dumps({"prompt": f"Question {i}", "solution": str(i)} | columns)


@pytest.fixture
def numbered(tmp_path):
    """Samples of two files with 60 and 43 rows, a blank line in each."""
    for name, rows in (("a.jsonl", range(60)), ("b.jsonl", range(60, 103))):
        lines = [line(i) for i in rows]
        (tmp_path / name).write_text("\n".join([*lines[:10], "", *lines[10:]]))
    return load_samples([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], [], question="{question}", check_images=True)


def test_any_row_by_its_place(numbered, tmp_path):
    assert len(numbered) == 103
    for i in (102, 0, 59, 60, 9, 10, -1):
        place = i % 103
        sample = numbered[i]
        assert (sample.solution, sample.index) == (str(place), place)
        name, first = ("a.jsonl", 0) if place < 60 else ("b.jsonl", 60)
        assert sample.source == f"{tmp_path}/{name}:{place - first + (1 if place - first < 10 else 2)}"
        assert numbered.source(place) == sample.source
    with pytest.raises(IndexError):
        numbered[103]
    assert [sample.index for sample in numbered[58:62]] == [58, 59, 60, 61]
    assert [sample.index for sample in numbered] == list(range(103))


def test_rows_are_read_from_the_file_each_time(numbered, tmp_path):
    path = tmp_path / "b.jsonl"
    path.write_text(path.read_text().replace("Question 61", "Question ??"))
    assert numbered[61].messages[0]["content"][0]["text"] == "Question ??"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match=r"b\.jsonl:2: the file has changed since it was opened$"):
        numbered[61]


def test_samples_travel_to_a_worker(numbered):
    there = pickle.loads(pickle.dumps(numbered))
    assert [there[i] for i in (0, 60, 102)] == [numbered[i] for i in (0, 60, 102)]


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """20 MB of rows, 16 bytes held of each, and one row at a time while they are checked."""
    path = tmp_path / "big.jsonl"
    rows = 2_000
    path.write_text("\n".join(line(i, context="x" * 10_000) for i in range(rows)))
    tracemalloc.start()
    samples = load_samples([path], [], question="{question}", check_images=True)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert os.path.getsize(path) > 20e6
    assert held < 150 * rows
    assert peak < 1e6
    assert samples[rows - 1].columns["context"] == "x" * 10_000


def test_selected_rows_keep_their_index(numbered):
    part = numbered.select([70, 3])
    assert [sample.index for sample in part] == [70, 3]
    assert [sample.solution for sample in part] == ["70", "3"]
    assert len(part.select([5])) == 1


def split(samples, ratio=0.2, seed=0):
    train, validation = validation_split(samples, ratio, seed)
    return [sample.index for sample in train], [sample.index for sample in validation]


def test_a_split_is_disjoint_and_whole(numbered):
    train, validation = split(numbered)
    assert len(validation) == 21  # round(0.2 * 103)
    assert sorted(train + validation) == list(range(103))
    assert train == sorted(train)
    assert validation == sorted(validation)
    assert 5 <= sum(index < 60 for index in validation) <= 18  # of both files


def test_a_split_is_of_its_seed(numbered, tmp_path):
    again = load_samples([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], [], question="Q {question}", check_images=False)
    assert split(again) == split(numbered)
    assert split(numbered, seed=1)[1] != split(numbered)[1]
    assert set(split(numbered, 0.1)[1]) < set(split(numbered, 0.2)[1])


def test_the_split_of_this_version_is_that_of_the_next(numbered):
    assert split(numbered.select(range(20)), 0.2, seed=7)[1] == [2, 5, 11, 18]


@pytest.mark.parametrize("ratio, validation", [(0.001, 1), (0.999, 2)], ids=["few", "many"])
def test_no_part_is_empty(numbered, ratio, validation):
    assert [len(part) for part in split(numbered.select(range(3)), ratio)] == [3 - validation, validation]


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratios_that_are_refused(numbered, ratio):
    with pytest.raises(SettingError, match=r"^val_split_ratio is .*: it must be above 0 and below 1$"):
        validation_split(numbered, ratio, 0)


@pytest.mark.parametrize("indent", [None, 1], ids=["one-line", "indented"])
def test_a_json_array(tmp_path, indent):
    rows = [{"prompt": "a\n[", "solution": "1"}, {"prompt": "b", "solution": "2"}]
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps(rows, indent=indent) + "\n")
    read = json_rows(path)
    assert isinstance(read, ArrayRows)
    assert [read.read(i) for i in range(len(read))] == rows
    assert [read.line(i) for i in (0, 1)] == ([2, 2] if indent is None else [3, 7])


def test_json_lines_under_the_other_name(tmp_path):
    (tmp_path / "rows.json").write_text(f"{line(0)}\n{line(1)}\n")
    assert isinstance(json_rows(tmp_path / "rows.json"), LineRows)


@pytest.mark.parametrize(
    "content, expected",
    [
        pytest.param('[{"a": 1},\n', "2: not JSON: Expecting value", id="cut"),
        pytest.param("[", "1: not JSON: Expecting value", id="bracket"),
        pytest.param('[\n{"a": 1},\n3]', "3: not a JSON object but int", id="number"),
    ],
)
def test_faults_of_an_array(tmp_path, content, expected):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        rows = json_rows(path)
        rows.read(len(rows) - 1)
    assert str(caught.value).startswith(f"{path}:{expected}")


def test_an_empty_array(tmp_path):
    (tmp_path / "rows.json").write_text("[ ]")
    with pytest.raises(DataError, match=r"rows\.json: the data set is empty"):
        load_samples([tmp_path / "rows.json"], [], question="{question}", check_images=False)
