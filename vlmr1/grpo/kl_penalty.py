"""The KL to the reference as a part of the reward, instead of a term of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmr1.types import Completion, Group


def with_kl(groups: Sequence[Group], estimator: str) -> list[Group]:
    """The groups with the KL of each completion, KL_i = sum over its tokens of k(ref_t - old_t); `old` is of the policy
    that drew it.

    k(d) = -d (k1) | d^2 / 2 (k2) | exp(d) - d - 1 (k3). `advantages.py` subtracts beta * KL_i from the
    reward: with k1 as in InstructGPT, arXiv:2203.02155, and in TRL's RLOO."""
    values = torch.stack([_kl(completion, estimator) for group in groups for completion in group.completions])
    parts = values.cpu().split([len(group.completions) for group in groups])  # advantages are computed on the host
    return [replace(group, kl=part) for group, part in zip(groups, parts, strict=True)]


def _kl(completion: Completion, estimator: str) -> Tensor:
    """[] float32, summed in float64."""
    assert completion.old_logp is not None and completion.ref_logp is not None
    ref = completion.ref_logp.double()
    d = ref - completion.old_logp.to(ref.device).double()  # [C]
    if estimator == "k1":
        return -d.sum().float()
    return (d.square() / 2 if estimator == "k2" else d.expm1() - d).sum().float()
