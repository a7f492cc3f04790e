"""Distances of reward curves, and the verdict, by hand."""

from __future__ import annotations

import pytest

from benchmarks.agreement import compare, distance, windows


def test_windows_leave_out_what_does_not_fill_one():
    assert windows([1.0, 3.0, 5.0, 7.0, 9.0], 2) == [2.0, 6.0]


def test_distance_is_of_windows():
    """Means 2 and 6 against 2 and 3: differences 0 and 3."""
    assert distance([1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 3.0, 3.0], 2) == pytest.approx((9 / 2) ** 0.5)


@pytest.mark.parametrize(("off", "agree"), [(0.5, True), (1.5, False)])
def test_arms_agree_within_the_spread_of_seeds(off, agree):
    """Two naive runs that are 1 apart; the shared run of one seed is `off` its naive one."""
    naive = {0: [1.0] * 4, 1: [2.0] * 4}
    result = compare({"naive": naive, "shared": {0: [1.0 + off] * 4, 1: [2.0] * 4}}, 2)
    assert result["naive to shared"] == {"0": pytest.approx(off), "1": 0}
    assert result["naive to naive"] == {"0 and 1": pytest.approx(1)}
    assert result["last window"]["shared"] == {"0": 1.0 + off, "1": 2.0}
    assert result["agree"] is agree
