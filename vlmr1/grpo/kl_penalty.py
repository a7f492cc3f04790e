"""The KL to the reference as a part of the reward, instead of a term of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmr1.types import Completion, Group, Pack


def unjudged(groups: Sequence[Group]) -> list[Group]:
    """The groups with advantages of 0, so that they can be packed before their rewards are complete."""
    return [replace(group, advantages=torch.zeros(len(group.completions))) for group in groups]


def with_kl(
    groups: Sequence[Group], plan: Sequence[Sequence[Group]], packs: Sequence[Pack], estimator: str
) -> list[Group]:
    """The groups with the KL of each completion, KL_i = sum over its tokens of k(ref_t - old_t), and with the log-probs
    that it is made of, from the packs of a plan that holds every completion; `old` is of the policy that drew.

    k(d) = -d (k1) | d^2 / 2 (k2) | exp(d) - d - 1 (k3). The reward becomes r_i - beta * KL_i: with k1 that of
    InstructGPT, arXiv:2203.02155, and of TRL's RLOO."""
    known: dict[int, Completion] = {}
    for row, pack in zip(plan, packs, strict=True):
        completions = [completion for group in row for completion in group.completions]
        assert pack.old_logp is not None and pack.ref_logp is not None
        sizes = [len(completion.token_ids) for completion in completions]
        olds, refs = (logp.cpu().split(sizes) for logp in (pack.old_logp, pack.ref_logp))
        for completion, old, ref in zip(completions, olds, refs, strict=True):
            known[id(completion)] = replace(completion, old_logp=old, ref_logp=ref)
    out = []
    for group in groups:
        completions = tuple(known[id(completion)] for completion in group.completions)
        out.append(replace(group, completions=completions, kl=torch.stack([_kl(c, estimator) for c in completions])))
    return out


def _kl(completion: Completion, estimator: str) -> Tensor:
    """[] float32, summed in float64."""
    assert completion.old_logp is not None and completion.ref_logp is not None
    d = completion.ref_logp.double() - completion.old_logp.double()  # [C]
    if estimator == "k1":
        return -d.sum().float()
    return (d.square() / 2 if estimator == "k2" else d.expm1() - d).sum().float()
