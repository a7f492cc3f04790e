"""The runner of the faults: it tells a fault that a test notices from a change that none does."""

from pathlib import Path

import pytest

from tests.golden.inject import TREE, copy_tree, is_caught, read_faults

FAULT = next(fault for fault in read_faults(base=False) if fault["name"] == "advantage_without_mean")


@pytest.mark.slow
def test_a_fault_is_caught_and_undone(tmp_path: Path):
    copy_tree(TREE, tmp_path)
    assert is_caught(tmp_path, FAULT)
    assert (tmp_path / FAULT["file"]).read_bytes() == (TREE / FAULT["file"]).read_bytes()
    assert not is_caught(tmp_path, FAULT | {"new": FAULT["old"]})
    with pytest.raises(ValueError, match=FAULT["name"]):
        is_caught(tmp_path, FAULT | {"old": "no such text"})
