"""The arms of the memory table: settings that a run accepts, and the table."""

from __future__ import annotations

import pytest

from benchmarks.memory import ARMS, case_of
from benchmarks.plan_step import config_of
from benchmarks.suite.quoted import memory_rows


@pytest.mark.parametrize("name", ARMS)
def test_a_run_accepts_every_arm(name, tmp_path):
    config = config_of(case_of(name).settings, tmp_path, "cpu")
    for setting, value in ARMS[name].items():
        assert getattr(config, setting) == value


def test_rows():
    found = {"base": {"rollout": 50.0, "policy": 100.0}, "other": {"rollout": 60.0, "policy": 20.0}}
    assert memory_rows(found) == [["base", "100", "policy", "1.00"], ["other", "60", "rollout", "0.60"]]
