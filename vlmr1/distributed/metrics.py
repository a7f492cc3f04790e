"""Metrics of one update, combined over packs and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlmr1.distributed.ranks import Ranks

# Metrics that combine over packs, ranks and steps by their maximum or minimum, not by their mean.
MAXIMA = (
    "ratio_max",
    "rollout/logp_difference_max",
    "rollout/importance_ratio_max",
    "completion_length_max",
    "clip_high_max",
    "num_tokens",
)
MAXIMA += ("gpu/memory_used_mib", "gpu/process_memory_mib")
MINIMA = ("rollout/importance_ratio_min", "clip_low_min")
# What is counted adds up; what is measured in seconds or MiB is as long, or as much, as on the slowest or fullest rank.
COUNTS = ("packs", "packed_tokens", "repeated_prompt_tokens", "dynamic_sampling/tokens_discarded")
COUNTS += ("rollout/tokens_per_second", "rollout/preemptions", "rollout/out_of_memory")
COUNTS += tuple(f"dynamic_sampling/groups_{what}" for what in ("drawn", "replaced", "discarded", "left_flat"))
LONGEST = ("dynamic_sampling/rounds", "rollout/prefill_seconds", "rollout/decode_seconds", "rollout/kv_peak_mib")


def over_ranks(values: Mapping[str, float], weight: float, ranks: Ranks) -> dict[str, float]:
    """Sums of counts, maxima of maxima, and means weighted by `weight`, the number of this rank's groups. A value that
    is NaN, such as the mean of a reward that applied to no row, is left out."""
    everyone = ranks.all_gather((dict(values), weight))
    names = dict.fromkeys(name for own, _ in everyone for name in own)
    known = {name: [(own[name], w) for own, w in everyone if not math.isnan(own.get(name, math.nan))] for name in names}
    return {name: _combined(name, values) for name, values in known.items() if values}


def _combined(name: str, known: Sequence[tuple[float, float]]) -> float:
    values = [value for value, _ in known]
    if name in COUNTS:
        return sum(values)
    if name in MAXIMA or name in LONGEST:
        return max(values)
    if name in MINIMA:
        return min(values)
    return sum(value * weight for value, weight in known) / sum(weight for _, weight in known)


def all_losses(
    loss: Tensor, tokens: int, parts: Sequence[dict[str, Tensor]], ranks: Ranks
) -> tuple[Tensor, dict[str, float]]:
    """The step's loss [] and metrics, from each rank's share, its completion tokens and the metrics of its packs."""
    if ranks.world_size == 1:
        return loss, combine(parts, tokens=tokens)
    own = [{name: value.cpu() for name, value in part.items() if name != "logp"} for part in parts]
    losses, counts, lists = zip(*ranks.all_gather((float(loss), tokens, own)), strict=True)
    return loss.new_tensor(sum(losses)), combine([part for each in lists for part in each], tokens=sum(counts))


def combine(parts: Sequence[dict[str, Tensor]], tokens: int) -> dict[str, float]:
    """Metrics of a step of `tokens` completion tokens from those of its packs: maxima, and means over the rows that
    were computed, which are `tokens - dropped_rows`."""
    rows = torch.stack([part["tokens"].double() - part["dropped_rows"].double() for part in parts])  # [packs]
    out = {"tokens": float(tokens), "dropped_rows": tokens - float(rows.sum())}
    for name in parts[0].keys() - {"logp", *out}:
        values = torch.stack([part[name].double() for part in parts])
        if name in MAXIMA:
            out[name] = float(values.max())
        elif name in MINIMA:
            out[name] = float(values.min())
        else:
            out[name] = float((values * rows).sum() / rows.sum().clamp(min=1))
    return out
