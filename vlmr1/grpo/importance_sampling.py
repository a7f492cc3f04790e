"""Importance-sampling correction between the rollout engine and the policy: a weight of the loss of each row.

The ratio is exp(old - engine): `old` of the policy before its first update, recomputed, and `engine` the rollout
engine's log-probs of the policy. Both are of the full distribution at the temperature. The log-probs that
tokens were drawn with, after top_k, top_p and min_p, have no part in it: against them the ratio would be the
probability that the truncation left, at every token, whatever the engines agree on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmr1.errors import SettingError
from vlmr1.types import Completion, Pack


def set_importance_denominators(packs: Sequence[Pack], mode: str, cap: float) -> dict[str, float]:
    """Set `importance_denominator` of the completions in these packs; return metrics of the ratios r before the cap.

    w_t = min(r_t, cap) for token_truncate, r_t where it is at most cap, else 0, for token_mask; for sequence_truncate
    and sequence_mask likewise with r = exp(sum over the sequence of old - engine), for all its rows. Names, sums and
    bounds are those of TRL's vllm_importance_sampling_mode. KL and entropy bonus have no weight. With "none" nothing
    is set. SettingError where the engine reports no log-probs."""
    if mode == "none":
        return {}
    counted, ratios = any(pack.weight for pack in packs), []
    for pack in packs:
        own = _set_denominators(pack, mode, cap)
        ratios += own if pack.weight or not counted else []
    every = torch.cat(ratios)
    return {
        "rollout/importance_ratio": float(every.mean()),
        "rollout/importance_ratio_min": float(every.min()),
        "rollout/importance_ratio_max": float(every.max()),
        "rollout/importance_cut": float((every > cap).double().mean()),
    }


def _set_denominators(pack: Pack, mode: str, cap: float) -> list[Tensor]:
    """float64 ratios of each completion: of its rows [C], or of the sequence [1]."""
    if pack.rollout_logp is None:
        raise SettingError("importance_sampling_correction: the rollout engine reports no log-probs")
    assert pack.old_logp is not None
    olds = pack.split(pack.old_logp.double().cpu())  # one transfer a pack: the metrics are read on the host
    ratios = []
    for completion, old in zip(pack.completions, olds, strict=True):
        assert completion.logp is not None
        difference = old - completion.logp.double()
        if mode.startswith("sequence"):
            difference = difference.cumsum(0)[-1:]
        ratios.append(difference.exp())
        completion.importance_denominator = _denominator(completion, old, ratios[-1], mode, cap)
    return ratios


def _denominator(completion: Completion, old: Tensor, ratio: Tensor, mode: str, cap: float) -> Tensor | None:
    """[C] float32 so that min(exp(old - denominator), cap) is the weight; infinite where that is 0."""
    if mode == "token_truncate":
        return completion.logp
    weight = ratio.clamp(max=cap) if mode == "sequence_truncate" else ratio.masked_fill(ratio > cap, 0.0)
    return (old - weight.log()).float()
