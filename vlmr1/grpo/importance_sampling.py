"""Importance-sampling correction between the rollout engine and the policy: a weight of the loss of each row.

The ratio is exp(old - engine): `old` of the policy before its first update, recomputed, and `engine` what the rollout
engine says that the policy's log-probs are. Both are of the full distribution at the temperature. The log-probs that
tokens were drawn with, after top_k, top_p and min_p, have no part in it: against them the ratio would be the
probability that the truncation left, at every token, whatever the engines agree on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmr1.errors import SettingError
from vlmr1.types import Pack


def with_correction(packs: Sequence[Pack], mode: str, cap: float) -> tuple[list[Pack], dict[str, float]]:
    """The packs with `trust_logp`, and metrics of the ratios r before they are cut; with "none" as they are.

    w_t = min(r_t, cap) for token_truncate, r_t where it is at most cap, else 0, for token_mask; for sequence_truncate
    and sequence_mask the same of r = exp(sum over the sequence of old - engine), for all its rows. Names, sums and
    bounds are those of TRL's vllm_importance_sampling_mode. KL and entropy bonus have no weight.
    SettingError where the engine reports no log-probs."""
    if mode == "none":
        return list(packs), {}
    weighted, ratios = [], []
    for pack in packs:
        ratio, per_row = _ratios(pack, by_sequence=mode.startswith("sequence"))
        if pack.weight or not any(each.weight for each in packs):
            ratios.append(ratio)
        weighted.append(replace(pack, trust_logp=_trust(pack, per_row, mode, cap)))
    every = torch.cat(ratios)
    return weighted, {
        "rollout/importance_ratio": float(every.mean()),
        "rollout/importance_ratio_min": float(every.min()),
        "rollout/importance_ratio_max": float(every.max()),
        "rollout/importance_cut": float((every > cap).double().mean()),
    }


def _ratios(pack: Pack, *, by_sequence: bool) -> tuple[Tensor, Tensor]:
    """float64 ratios of rows [N] or sequences [B], and those of the rows [N]."""
    if pack.rollout_logp is None:
        raise SettingError("importance_sampling_correction: the rollout engine reports no log-probs")
    assert pack.old_logp is not None
    difference = pack.old_logp.double().cpu() - pack.rollout_logp.double()  # [N]
    if not by_sequence:
        ratio = difference.exp()
        return ratio, ratio
    sums = torch.zeros(len(pack.advantages), dtype=torch.float64).index_add(0, pack.seq_ids, difference)  # [B]
    return sums.exp(), sums.exp()[pack.seq_ids]


def _trust(pack: Pack, ratio: Tensor, mode: str, cap: float) -> Tensor:
    """What the kernels divide by, so that min(exp(old - trust), cap) is the weight; infinite where that is 0."""
    assert pack.old_logp is not None and pack.rollout_logp is not None
    if mode == "token_truncate":
        return pack.rollout_logp
    weight = ratio.clamp(max=cap) if mode == "sequence_truncate" else ratio.masked_fill(ratio > cap, 0.0)
    return (pack.old_logp.double().cpu() - weight.log()).float()
