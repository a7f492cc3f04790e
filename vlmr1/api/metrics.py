"""Metrics under the names of TRL, with its meanings: means and deviations are over the completions of all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmr1.distributed.ranks import Ranks
from vlmr1.rewards.aggregate import weighted_sum
from vlmr1.types import Group

# Of an evaluation, where every ratio is 1.
NOT_CLIPPED = {"tokens": 1.0} | dict.fromkeys(
    ("dropped_rows", "clip_low", "clip_high", "clip_low_min", "clip_high_max"), 0.0
)


@dataclass(frozen=True)
class Facts:
    """Values that the metrics need of some groups, B completions in all."""

    rewards: Tensor  # [B, R] float64
    group: Tensor  # [B] number of the group
    length: Tensor  # [B] float64
    ended: Tensor  # [B] bool: at an end token or stop text, not at the limit
    tokens: int  # of prompts and completions, the prompt counted for each completion

    @classmethod
    def of(cls, groups: Sequence[Group], ranks: Ranks) -> Facts:
        """Facts of the groups of all ranks."""
        own = [
            (
                group.rewards,
                [(len(c.token_ids), c.finish_reason) for c in group.completions],
                len(group.prompt.input_ids),
            )
            for group in groups
        ]
        every = [each for part in ranks.all_gather(own) for each in part]
        completions = [each for _, known, _ in every for each in known]
        return cls(
            torch.cat([rewards for rewards, _, _ in every if rewards is not None]).double(),
            torch.tensor([i for i, (_, known, _) in enumerate(every) for _ in known]),
            torch.tensor([length for length, _ in completions], dtype=torch.float64),
            torch.tensor([reason == "stop" for _, reason in completions]),
            sum(length + prompt for _, known, prompt in every for length, _ in known),
        )


def metrics_of(facts: Facts, names: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Metrics of rewards and lengths."""
    total = weighted_sum(facts.rewards, weights)  # [B]
    values = {"reward": _mean(total), "reward_std": _std(total)}
    for i, name in enumerate(names):
        values |= {f"rewards/{name}/mean": _mean(facts.rewards[:, i]), f"rewards/{name}/std": _std(facts.rewards[:, i])}
    groups = [total[facts.group == i] for i in range(int(facts.group.max()) + 1)]
    values["frac_reward_zero_std"] = sum(abs(_std(group)) < 1e-8 for group in groups) / len(groups)
    values["completions/clipped_ratio"] = 1 - float(facts.ended.double().mean())
    ended = facts.length[facts.ended]
    for kind, lengths in (("", facts.length), ("_terminated", ended if len(ended) else torch.zeros(1))):
        for name in ("mean", "min", "max"):
            values[f"completions/{name}{kind}_length"] = float(getattr(lengths, name)())
    return {name: value for name, value in values.items() if not math.isnan(value)}


def clip_ratios(metrics: Mapping[str, float], loss_type: str) -> dict[str, float]:
    """The shares of clipped tokens. Completions that the pass leaves out have advantage 0: none is clipped there."""
    tokens, dropped = metrics["tokens"], metrics["dropped_rows"]
    share = (tokens - dropped) / max(tokens, 1.0)
    low, high = share * metrics["clip_low"], share * metrics["clip_high"]
    if loss_type == "cispo":
        return {"cispo_clip_ratio": high}
    return {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "clip_ratio/low_min": 0.0 if dropped else metrics["clip_low_min"],
        "clip_ratio/high_max": metrics["clip_high_max"],
    }


def _mean(values: Tensor) -> float:
    return float(values.nanmean())


def _std(values: Tensor) -> float:
    """Return the standard deviation of the values that are known; 0 for one alone."""
    known = values[~values.isnan()]
    return float(known.std()) if len(known) > 1 else 0.0
