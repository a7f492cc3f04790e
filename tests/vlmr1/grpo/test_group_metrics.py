"""What a step and a run report, on numbers small enough to check by hand."""

import math

import pytest
import torch

from vlmr1.distributed.metrics import combine
from vlmr1.grpo.group_metrics import group_statistics
from vlmr1.types import Completion, Group, Prompt, Sample

PROMPT = Prompt(Sample([], (), "", "", 0), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3))


def group(rewards: list[list[float]], lengths: list[int], stopped: int) -> Group:
    """`stopped`: how many completions ended by themselves."""
    reasons = ["stop"] * stopped + ["length"] * (len(lengths) - stopped)
    pairs = zip(lengths, reasons, strict=True)
    completions = tuple(Completion(torch.zeros(n, dtype=torch.int64), None, None, "", reason) for n, reason in pairs)
    return Group(PROMPT, completions, torch.tensor(rewards))


GROUPS = [
    group([[1.0, 0.0], [0.0, 1.0], [0.5, 1.0]], [3, 5, 4], stopped=2),
    group([[0.25, 1.0], [0.25, 1.0], [0.25, 1.0]], [6, 6, 6], stopped=0),
]


def test_group_statistics():
    """Weights 2 and 1: the first group's sums are 2, 1, 2; the second's are all 1.5."""
    out = group_statistics(GROUPS, ["accuracy", "format"], [2.0, 1.0])
    assert out == pytest.approx(
        {
            "reward": (2 + 1 + 2 + 3 * 1.5) / 6,
            "reward_std": math.sqrt(1 / 3) / 2,  # of 2, 1, 2, with n - 1; the second group's is 0
            "rewards/accuracy/mean": (1 + 0 + 0.5 + 3 * 0.25) / 6,
            "rewards/accuracy/std": 0.5 / 2,
            "rewards/format/mean": 5 / 6,
            "rewards/format/std": math.sqrt(1 / 3) / 2,
            "zero_variance_groups": 0.5,
            "completion_length": 30 / 6,
            "completion_length_max": 6.0,
            "truncated": 4 / 6,
        },
        rel=1e-12,
    )


def test_a_reward_that_does_not_apply_is_in_no_mean():
    """`format` scores the second and third completion, `accuracy` the first; nothing scores the last group."""
    nan = math.nan
    groups = [group([[1.0, nan], [nan, 1.0], [nan, 0.5]], [3, 5, 4], 2), group([[nan, nan]] * 3, [6, 6, 6], 0)]
    out = group_statistics(groups, ["accuracy", "format"], [2.0, 1.0])
    assert (out["reward"], out["reward_std"]) == pytest.approx((3.5 / 3, math.sqrt(7 / 12)))  # of 2, 1, 0.5
    assert (out["rewards/accuracy/mean"], out["rewards/accuracy/std"]) == (1.0, 0.0)
    assert (out["rewards/format/mean"], out["rewards/format/std"]) == pytest.approx((0.75, math.sqrt(0.125)))
    assert out["zero_variance_groups"] == 0.5


def test_a_group_is_flat_by_its_weighted_sum():
    """1 + 0 and 0 + 1 are the same reward, but 0.5 + 1 is not."""
    for weights, flat in (([1.0, 1.0], 0.5), ([0.0, 0.0], 1.0)):
        assert group_statistics(GROUPS, ["a", "b"], weights)["zero_variance_groups"] == flat


def test_combine_packs():
    """Packs of 10 and 30 tokens, 6 and 30 of them projected, of a step of 50: means weigh 1 to 5, ratio_max is the
    greatest, and 50 - 36 tokens were dropped, in the packs or before."""
    one = {"kl": 0.1, "entropy": 2.0, "clip_low": 0.0, "clip_high": 0.5, "ratio_max": 1.5}
    other = {"kl": 0.3, "entropy": 1.0, "clip_low": 0.2, "clip_high": 0.1, "ratio_max": 1.25}
    parts = [
        {name: torch.tensor(value) for name, value in values.items()}
        | {"tokens": torch.tensor(tokens), "dropped_rows": torch.tensor(dropped), "logp": torch.zeros(tokens)}
        for values, tokens, dropped in ((one, 10, 4), (other, 30, 0))
    ]
    expected = {"kl": 1.6 / 6, "entropy": 7 / 6, "clip_low": 1 / 6, "clip_high": 1 / 6, "ratio_max": 1.5}
    expected |= {"tokens": 50.0, "dropped_rows": 14.0}
    assert combine(parts, tokens=50) == pytest.approx(expected, rel=1e-6)
    alone = combine(parts[:1], tokens=10)
    assert alone["kl"] == pytest.approx(float(torch.tensor(0.1))) and alone["dropped_rows"] == 4
