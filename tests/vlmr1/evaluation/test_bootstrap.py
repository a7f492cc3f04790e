"""Intervals over rows: against the normal one, shares of what may be absent, pairs."""

import math

import numpy as np
import pytest

from vlmr1.evaluation.bootstrap import DRAWS, counts, ratio
from vlmr1.evaluation.compare import difference


def test_each_draw_has_as_many_rows_as_the_data():
    drawn = np.concatenate(list(counts(7)))
    assert drawn.shape == (DRAWS, 7) and (drawn.sum(1) == 7).all()
    assert drawn.mean() == 1.0 and 0.75 < drawn.var() < 0.96  # binomial: 7 * 1/7 * 6/7
    assert len(np.unique(drawn, axis=0)) > 400


def test_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(0.4, 0.2, 500)
    found = ratio(values.tolist())
    half = 1.96 * values.std() / math.sqrt(500)
    assert found.value == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    again = ratio(values.tolist())
    assert (again.low, again.high) == (found.low, found.high)


def test_a_share_is_of_what_was_drawn():
    """Two rows with 1 of 1 and 1 of 3: 2/4 over the data, 1 and 1/3 where one row is drawn twice."""
    found = ratio([1, 1], [1, 3])
    assert found.value == 0.5
    assert set(np.round(found.replicates, 12)) == {1.0, 0.5, round(1 / 3, 12)}


def test_a_share_of_nothing_has_no_value():
    found = ratio([0, 0], [0, 0])
    assert (found.value, found.low, found.high) == (None, None, None)
    half = ratio([0, 1], [0, 1])  # draws without the second row have no value, and are left out
    assert (half.value, half.low, half.high) == (1.0, 1.0, 1.0) and np.isnan(half.replicates).any()


def test_differences_are_paired():
    """Rows vary much, the change is the same for each: its interval is a point, which unpaired draws would not give."""
    rows = np.random.default_rng(2).uniform(0, 1, 50)
    value, low, high = difference(ratio(rows.tolist()), ratio((rows + 0.125).tolist()))
    assert (value, low, high) == (pytest.approx(0.125), pytest.approx(0.125), pytest.approx(0.125))
    assert difference(ratio([0], [0]), ratio([1], [1])) == (None, None, None)
