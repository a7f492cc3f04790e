"""The plan beside real runs, each in a process of its own. No constant of the plan was fitted to a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plan import compare, measure
from benchmarks.plan_step import CASES


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures resident memory through /proc")
@pytest.mark.parametrize("name", ["group", "small-checkpointing"])
def test_the_peak_is_within_15_percent(name):
    assert CASES[name].device == "cpu"
    found = compare(name, measure(name, "cpu", threads=1), "cpu")
    assert found["phase"] == max(found["planned_mib"], key=lambda phase: found["planned_mib"][phase]) == "policy"
    assert found["ratio"] == pytest.approx(1, abs=0.15)
