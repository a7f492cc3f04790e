"""Shares of clipped tokens of each completion, for TRL's `clip_ratio/low_min` and `high_max`."""

import pytest
import torch

from vlmr1.distributed.metrics import combine
from vlmr1.grpo.loss import clipped_shares
from vlmr1.grpo.packing import make_pack
from vlmr1.types import Completion, Group, Prompt, Sample
from vlmr1_kernels import GRPOSettings

RATIOS = ([0.5, 1.0, 2.0, 1.1], [0.5, 0.7], [2.0, 1.3, 0.7])  # of the tokens of three completions
CASES = {  # level; advantages; minimum of the lower, maximum of the upper share
    "low": ("token", [-1.0, -2.0, -3.0], (1 / 4, 0.0)),
    "high": ("token", [-1.0, -2.0, 3.0], (0.0, 2 / 3)),
    "sequence_low": ("sequence", [-1.0, -2.0, 3.0], (0.0, 1.0)),
    "sequence": ("sequence", [1.0, -2.0, 0.0], (0.0, 0.0)),
}


@pytest.mark.parametrize(("level", "advantages", "expected"), CASES.values(), ids=CASES.keys())
def test_minimum_and_maximum_over_completions(
    level: str, advantages: list[float], expected: tuple[float, float]
) -> None:
    ids = torch.arange(3)
    completions = []
    for ratios in RATIOS:
        old = torch.zeros(len(ratios)) - 1
        completions.append(Completion(torch.zeros(len(ratios), dtype=torch.long), old, old, "", "stop", old_logp=old))
    prompt = Prompt(Sample([], (), "", "made", 0), ids, ids.expand(3, -1))
    pack = make_pack([Group(prompt, tuple(completions), advantages=torch.tensor(advantages))])
    logp = torch.cat([torch.tensor(each).log() - 1 for each in RATIOS])
    found = clipped_shares(logp, pack, GRPOSettings(importance_level=level))
    assert (float(found["clip_low_min"]), float(found["clip_high_max"])) == pytest.approx(expected)


def test_over_packs_they_are_the_least_and_the_greatest() -> None:
    parts = [
        {name: torch.tensor(value) for name, value in zip(("clip_low_min", "clip_high_max"), values, strict=True)}
        | {"tokens": torch.tensor(4.0), "dropped_rows": torch.tensor(0.0)}
        for values in ((0.5, 0.1), (0.25, 0.75))
    ]
    found = combine(parts, tokens=8)
    assert (found["clip_low_min"], found["clip_high_max"]) == (0.25, 0.75)
