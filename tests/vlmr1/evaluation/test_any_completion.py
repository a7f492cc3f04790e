"""Whatever a completion says, an evaluation scores it, and its page can be written."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmr1.evaluation.records import Record
from vlmr1.evaluation.tasks import score_task
from vlmr1.report.cases import write_cases
from vlmr1.types import Sample

SIZE = (100, 80)
SOLUTIONS = {"ovd": '[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}]', "rec": "[1, 2, 30, 40]"}
TEXT = st.text(st.characters(), max_size=8) | st.sampled_from(["cat", "\ud800", "None"])
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1e308, -1e308, 5e-324])
LEAVES = st.none() | st.booleans() | NUMBERS | TEXT
BOXES = st.lists(NUMBERS, min_size=4, max_size=4)
KEYS = st.sampled_from(["bbox_2d", "label", "score", "confidence"])
ENTRIES = st.dictionaries(KEYS, BOXES | LEAVES, max_size=4)
ANY = st.recursive(
    LEAVES | BOXES, lambda each: st.lists(each, max_size=3) | st.dictionaries(KEYS | TEXT, each), max_leaves=6
)
WRAPPED = ["{}", "<answer>{}</answer>", "<answer>```json\n{}\n```</answer>", "<think>a</think><answer>{}</answer>"]


def digits(value: object) -> str:
    """As JSON, integers of any length too."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**300:
        return f"{'-' if value < 0 else ''}1{'0' * 5000}"
    if isinstance(value, list):
        return f"[{', '.join(map(digits, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)}: {digits(each)}' for key, each in value.items())}}}"
    return json.dumps(value)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "a.png"
    Image.new("RGB", SIZE).save(path)
    return path


@pytest.mark.parametrize("task", SOLUTIONS)
@settings(deadline=None, max_examples=150)
@given(
    answer=st.lists(ENTRIES, max_size=4) | ENTRIES | ANY,
    shell=st.sampled_from(WRAPPED),
    extent=st.sampled_from([SIZE, (1000, 1000)]),
)
@example(answer={"bbox_2d": [1, 2, 30, 40], "label": "cat", "score": 10**400}, shell=WRAPPED[1], extent=SIZE)
@example(answer=[{"bbox_2d": [1, 2, 30, 40], "label": "\ud800"}], shell=WRAPPED[1], extent=SIZE)
@example(answer=[{"bbox_2d": [-1e308, 0, 1e308, 40], "label": "cat"}], shell=WRAPPED[1], extent=SIZE)
@pytest.mark.slow
def test_never_raises(task, image, answer, shell, extent):
    text = shell.format(digits(answer)) if "{}" in shell else shell
    sample = Sample([{"role": "user", "content": []}], (image,), SOLUTIONS[task], "data.jsonl:1", 0, {})
    records = [Record(row, "data.jsonl:1", (1,), text, "stop", SIZE, extent) for row in range(2)]
    scored = score_task(task, [sample] * 2, records)
    assert all(metric.value is None or 0 <= metric.value < 1e6 for metric in scored.metrics.values())
    with tempfile.TemporaryDirectory() as folder:
        write_cases(Path(folder) / "cases.html", title="a", rows=[], cases=scored.cases, count=1)
