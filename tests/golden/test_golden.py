"""A few golden runs against their record, as far as another machine can repeat them.

Floats round differently on other processors, and after an update runs part: only what the first one computes is
compared, to a tolerance. `python -m tests.golden.runs` compares bit by bit, on one machine."""

import json
from pathlib import Path

import pytest

from tests.golden.runs import HERE, RECORDED, differences, run

pytestmark = pytest.mark.slow
TREE = HERE.parents[1]
# Maxima and means of rounding errors: another machine has others.
ROUNDING = ("loss", "rollout/logp_difference", "rollout/logp_difference_max")


@pytest.mark.parametrize("name", ["shared", "naive", "text_only"])
def test_the_first_update_is_as_recorded(name: str, tmp_path: Path):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))["runs"][name]
    found = run(name, TREE, tmp_path)
    assert [set(row) for row in found["metrics"]] == [set(row) for row in recorded["metrics"]]
    assert len(found["weights"]) == len(recorded["weights"]) == 64
    first, expected = found["metrics"][0], recorded["metrics"][0]
    for metric in expected.keys() - set(ROUNDING):
        assert first[metric] == pytest.approx(expected[metric], rel=1e-3), metric
    for metric in ROUNDING:
        assert first[metric] == pytest.approx(expected[metric], abs=1e-5), metric


def test_every_difference_is_reported():
    metrics = [{"step": 1, "loss": 0.1, "kl": 0.0}, {"step": 2, "loss": 0.2, "kl": 0.0}]
    old = {"metrics": metrics, "weights": "a" * 64}
    assert differences(old, old) == []
    new = {"metrics": [metrics[0], {"step": 2, "loss": 0.1 + 0.1 + 2**-55, "reward": 1.0}], "weights": "b" * 64}
    assert differences(old, new) == [
        "step 2: kl: 0.0 -> absent",
        "step 2: loss: 0.2 -> 0.20000000000000004",
        "step 2: reward: absent -> 1.0",
        f"weights: {'a' * 16} -> {'b' * 16}",
    ]
    assert differences(old, old | {"metrics": metrics[:1]}) == ["2 steps -> 1"]
