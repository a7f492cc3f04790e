"""Completions on disk: half lines, whole batches, files of several ranks."""

import json

import pytest

from vlmr1.errors import UserError
from vlmr1.evaluation.records import Record, RecordFiles, append, read_records


def record(row: int, text: str = "é\u2028 \n") -> Record:
    return Record(row, f"data.jsonl:{row + 1}", (1, 2), text, "stop", (30, 20), (28, 28))


def test_there_and_back(tmp_path):
    files = RecordFiles(tmp_path, 2, 2)
    append(files.path, [record(0), record(1)])
    assert read_records(files.path) == [record(0), record(1)]
    assert files.path.read_bytes().count(b"\n") == 2


def test_batches_and_what_is_left_of_them(tmp_path):
    files = RecordFiles(tmp_path, 5, 2)
    assert files.batches == [range(0, 2), range(2, 4), range(4, 5)]
    append(files.path, [record(2), record(3), record(0)])
    done = files.gather()
    assert list(done) == [2, 3] and files.missing(done) == [range(0, 2), range(4, 5)]
    assert read_records(files.path) == [record(2), record(3)]  # half a batch is made again


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_half_written_line_is_dropped_with_its_batch(cut, tmp_path):
    files = RecordFiles(tmp_path, 4, 2)
    append(files.path, map(record, range(4)))
    whole = files.path.read_bytes()
    files.path.write_bytes(whole[:-cut])
    assert list(files.gather()) == [0, 1]
    assert files.path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


def test_parts_of_ranks_come_together_in_order(tmp_path):
    files = RecordFiles(tmp_path, 6, 2)
    assert files.part(0, 1) == files.path
    append(files.path, [record(0), record(1)])
    append(files.part(1, 2), [record(4), record(5)])
    append(files.part(0, 2), [record(2), record(3)])
    files.part(0, 2).open("a").write('{"row": 4')
    assert list(files.gather()) == [0, 1, 2, 3, 4, 5]
    assert [json.loads(line)["row"] for line in files.path.read_text().splitlines()] == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["completions.jsonl"]


@pytest.mark.parametrize("line", [b"no json", b'{"row": 1}', b"[1]"], ids=["words", "another object", "a list"])
def test_a_line_that_is_no_record_is_an_error(line, tmp_path):
    files = RecordFiles(tmp_path, 4, 2)
    files.path.write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"completions\.jsonl:1: not a record"):
        files.gather()


def test_nothing_done_leaves_no_file(tmp_path):
    assert RecordFiles(tmp_path, 4, 2).gather() == {} and list(tmp_path.iterdir()) == []
