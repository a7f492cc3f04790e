"""Advantages are those that TRL's own GRPOTrainer computes from the same rewards."""

import pytest
import torch

from tests.helpers.trl import trl_advantages
from vlmr1.grpo.advantages import with_advantages
from vlmr1.types import Completion, Group, Prompt, Sample


@pytest.mark.parametrize("missing", [(), ((0, 1),), ((0, 0), (0, 1)), ((1, 0), (1, 1), (4, 0))], ids=str)
@pytest.mark.parametrize("scale", ["group", "batch", "none", "normalize_then_sum"])
@pytest.mark.parametrize("rewards", [[[0.1, 0.9, 0.4], [0.5, 0.5, 0.5]], [[0.1, 0.9, 0.4], [0.0, 1.0, 1.0]]])
def test_advantages_are_those_of_trl(
    scale: str, rewards: list[list[float]], missing: tuple[tuple[int, int], ...]
) -> None:
    """Two functions; `missing` are completions and functions that do not apply to them."""
    prompt = Prompt(Sample([], (), "", "made", 0), torch.arange(2), torch.arange(2).expand(3, -1))
    completion = Completion(torch.arange(1), None, None, "", "stop")
    weights = [1.0, 0.5]
    columns = [torch.stack([torch.tensor(row), 1 - torch.tensor(row).square()], 1) for row in rewards]  # [G, 2]
    for place, function in missing:
        columns[place // 3][place % 3, function] = torch.nan
    groups = [Group(prompt, (completion,) * len(row), column) for row, column in zip(rewards, columns, strict=True)]
    scale, aggregation = ("group", scale) if scale == "normalize_then_sum" else (scale, "sum_then_normalize")
    made = with_advantages(groups, weights, scale, aggregation=aggregation)
    ours = torch.cat([group.advantages for group in made])  # type: ignore[misc]
    expected = trl_advantages(torch.cat(columns), torch.tensor(weights), len(rewards[0]), scale, aggregation)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
