"""Rows that are read while training: what is read when, in which order, and on which rank."""

import json
import pickle
from collections import Counter
from itertools import islice

import pytest

from tests.helpers.maker import Maker
from tests.helpers.rows import NUMBERED, numbered_files
from vlmr1.data.hub import parquet_rows
from vlmr1.data.mixture import Mixture
from vlmr1.data.prompts import PromptDataset
from vlmr1.data.rows import LineRows
from vlmr1.data.stream import GROUPS, ParquetGroups, StreamedLines, StreamSampler, stream_samples
from vlmr1.distributed.ranks import Ranks
from vlmr1.errors import DataError, SettingError
from vlmr1.grpo.buffer import BufferSampler

ROWS = 5000
BAD = 4000  # its line is no JSON


@pytest.fixture(scope="module")
def long_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "long.jsonl"
    lines = [json.dumps({"prompt": f"Question {i}", "solution": str(i)}) for i in range(ROWS)]
    lines[BAD] = "{"
    path.write_text("\ufeff" + "\n".join([*lines[:7], "", " ", *lines[7:]]), encoding="utf-8")
    return path


def test_a_file_is_indexed_as_far_as_it_is_read(long_file):
    rows = StreamedLines(long_file)
    assert rows.read(0)["solution"] == "0" and len(rows.lines) <= 1001
    assert rows.read(1500)["solution"] == "1500" and len(rows.lines) <= 2501
    with pytest.raises(TypeError, match=r"long\.jsonl is streamed"):
        len(rows)
    with pytest.raises(DataError, match=rf"long\.jsonl:{BAD + 3}: not JSON"):
        rows.read(BAD)


def test_the_rows_are_those_of_an_index(long_file):
    rows, indexed = StreamedLines(long_file), LineRows(long_file)
    for index in (4999, 6, 7, 1000, 999, 1001, 0, 4998):
        assert rows.read(index) == indexed.read(index) and rows.source(index) == indexed.source(index)
    assert [rows.has(index) for index in (ROWS - 1, ROWS)] == [True, False]
    there = pickle.loads(pickle.dumps(StreamedLines(long_file)))
    assert [there.read(index) for index in (3, 4999)] == [indexed.read(index) for index in (3, 4999)]


def test_a_file_that_has_changed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "solution": "1"}\n')
    rows = StreamedLines(path)
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the file has changed since it was opened"):
        rows.read(0)


def test_parquet_by_row_groups(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"prompt": [f"Question {i}" for i in range(20)], "solution": [str(i) for i in range(20)]})
    pyarrow.parquet.write_table(table, path, row_group_size=3)
    rows, mapped = ParquetGroups(path), parquet_rows(path)
    assert len(rows) == len(mapped) == 20 and len(rows.sizes) == 7
    for index in (19, 0, 3, 17, 8, 9, 0):
        assert rows.read(index) == mapped.read(index) and rows.source(index) == mapped.source(index)
    assert len(rows.groups) == GROUPS
    assert pickle.loads(pickle.dumps(rows)).read(5) == mapped.read(5)
    assert not pickle.loads(pickle.dumps(rows)).groups


@pytest.fixture
def stream(tmp_path):
    """A function that streams files a, b and c with 10, 40 and 7 rows."""
    numbered_files(tmp_path)

    def make(names="abc", sampling=(), weights=(), **options):
        files = [str(tmp_path / f"{name}.jsonl") for name in names]
        return stream_samples(files, [], Mixture(sampling, weights), question="{question}", **options)

    return make


def order(samples, count, buffer_size=0, seed=3):
    sampler = StreamSampler(samples, seed=seed, buffer_size=buffer_size)
    return [samples.sample(index).solution for index in islice(sampler, count)]


def test_files_follow_each_other_and_begin_anew(stream):
    assert order(stream(), 120) == [*NUMBERED, *NUMBERED, *NUMBERED[:6]]
    assert order(stream(sampling=["first:2", "all", "first:100"]), 50) == [*NUMBERED[:2], *NUMBERED[10:], "a0"]


def test_a_buffer_shuffles(stream):
    drawn = order(stream(), 2 * len(NUMBERED), buffer_size=16)
    one, two = drawn[: len(NUMBERED)], drawn[len(NUMBERED) :]
    assert sorted(one) == sorted(two) == sorted(NUMBERED) and one != NUMBERED and one != two
    assert order(stream(), 114, buffer_size=16) == drawn != order(stream(), 114, buffer_size=16, seed=4)
    assert all(NUMBERED.index(row) < place + 16 for place, row in enumerate(one))  # no row is read before it is near
    assert sorted(order(stream(), 57, buffer_size=1000)) == sorted(NUMBERED)


def test_weights_draw_the_file_of_each_row(stream):
    drawn = order(stream(weights=[3, 1, 4]), 4000)
    shares = Counter(row[0] for row in drawn)
    assert abs(shares["a"] / 4000 - 3 / 8) < 0.03 and abs(shares["b"] / 4000 - 1 / 8) < 0.03
    for name, count in (("a", 10), ("c", 7)):  # each file in its order, and anew
        rows = [row for row in drawn if row[0] == name]
        assert rows == [f"{name}{i % count}" for i in range(len(rows))]


def test_ranks_and_updates_share_the_stream(stream):
    """Two ranks, two updates a generation: four rows a batch, in turn."""
    samples = stream()
    ranks = [
        BufferSampler(
            StreamSampler(samples, seed=3, buffer_size=5),
            prompts=1,
            parts=2,
            iterations=1,
            drop_last=False,
            ranks=Ranks(rank, 2),
        )
        for rank in range(2)
    ]
    batches = [list(islice(sampler, 60)) for sampler in ranks]
    assert all(own[1::2] == [[]] * 30 for own in batches)
    together = [row for one, two in zip(*batches, strict=True) for pair in zip(one, two, strict=True) for row in pair]
    assert together == list(islice(StreamSampler(samples, seed=3, buffer_size=5), 120))


def test_a_row_is_checked_when_it_is_read(stream):
    def check(sample):
        if sample.solution == "b7":
            raise DataError(f"{sample.source}: not seven")

    samples = stream("ab", checks=[check])
    assert order(samples, 17) == NUMBERED[:17]
    with pytest.raises(DataError, match=r"b\.jsonl:8: not seven"):
        order(samples, 18)
    with pytest.raises(DataError, match=r"a\.jsonl:1: "):  # the first row of each file, at once
        stream("ab", checks=[refuse])


def refuse(sample):
    raise DataError(f"{sample.source}: no")


def test_prompts_of_a_stream(stream, make: Maker):
    """By `Sample.index`, which other ranks and resumed runs ask for."""
    samples = stream()
    dataset = PromptDataset(samples, make.builder)
    index = next(islice(StreamSampler(samples, seed=3, buffer_size=0), 30, None))
    assert dataset[index].sample == dataset.of_sample(index).sample
    assert dataset[index].sample.solution == NUMBERED[30] and dataset[index].sample.index == index
    for unknown in (len, list):
        with pytest.raises(TypeError, match="stream"):
            unknown(dataset.samples)
    with pytest.raises(TypeError):
        len(dataset)


@pytest.mark.parametrize(
    ("name", "content", "sampling", "says"),
    [
        ("rows.json", "[]", [], "rows.json cannot be streamed"),
        ("owner/name@train", None, [], "owner/name@train cannot be streamed"),
        ("none.jsonl", None, [], "none.jsonl cannot be streamed"),
        ("rows.parquet", "no", [], "rows.parquet cannot be read"),
        ("rows.jsonl", "{}\n", ["end:3"], "sampling_strategy end:3 cannot be used with streaming"),
        ("rows.jsonl", "{}\n", ["first:10%"], "sampling_strategy first:10% cannot be used with streaming"),
    ],
)
def test_what_cannot_be_streamed(name, content, sampling, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SettingError, match=says):
        stream_samples([name], [], Mixture(sampling), question="{question}")
