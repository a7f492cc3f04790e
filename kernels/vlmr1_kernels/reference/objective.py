"""Token losses of all loss types; `GRPOSettings` has the formulas."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from vlmr1_kernels.inputs import LossInputs
from vlmr1_kernels.reference.group_advantages import resolve_advantages
from vlmr1_kernels.settings import GRPOSettings


@dataclass(frozen=True)
class Rows:
    """Inputs of the objective by row, beside the log-probs."""

    advantage: Tensor  # [n] of the row's sequence
    weight: Tensor  # [n]; the loss is the sum of weight * token loss
    old: Tensor | None  # [n]
    ref: Tensor | None  # [n]
    sampling: Tensor | None  # [n]
    sequence: Tensor  # [n]
    length: Tensor  # [B] rows of each sequence, dropped ones included

    def __getitem__(self, index: Tensor | slice) -> "Rows":
        by_row = {name: value for name, value in vars(self).items() if name != "length" and value is not None}
        return replace(self, **{name: value[index] for name, value in by_row.items()})


class TokenLoss(NamedTuple):
    """Loss without entropy bonus and metrics of each row, all [n]."""

    loss: Tensor
    ratio: Tensor
    kl: Tensor | None


def make_rows(inputs: LossInputs, settings: GRPOSettings, dtype: torch.dtype) -> Rows:
    """Return the rows of a call; of their fields only the weight depends on the loss type."""
    advantages, normalizer = resolve_advantages(inputs), inputs.normalizer

    def cast(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(dtype)

    sequence = inputs.seq_ids.long()
    sequences, tokens = advantages.numel(), sequence.numel()
    ones = advantages.new_ones(tokens, dtype=dtype)
    length = advantages.new_zeros(sequences, dtype=dtype).index_add_(0, sequence, ones)  # [B]
    if settings.divisor == "length":
        count = max(sequences, 1) if normalizer is None else normalizer
        weight = length.reciprocal()[sequence] / count
    elif settings.divisor == "constant":
        count = max(sequences, 1) if normalizer is None else normalizer
        weight = ones / (count * (settings.max_completion_length or 1))
    else:
        weight = ones / (max(tokens, 1) if normalizer is None else normalizer)
    advantage = advantages.detach().to(dtype)[sequence]
    old, ref, sampling = (cast(value) for value in inputs.row_logps)
    return Rows(advantage, weight, old, ref, sampling, sequence, length)


def token_losses(logp: Tensor, rows: Rows, settings: GRPOSettings) -> TokenLoss:
    """Return the losses, differentiable in logp [n]. At sequence level the rows must be whole sequences."""
    old = logp.detach() if rows.old is None else rows.old
    log_ratio = logp - old
    if settings.sequence_level:
        # index_add sums sequentially, which in float32 is inaccurate for long sequences.
        total = torch.zeros_like(rows.length, dtype=torch.float64)  # [B]
        total = total.index_add(0, rows.sequence, log_ratio.double())
        log_ratio = (total / rows.length)[rows.sequence].to(logp.dtype)
    ratio = log_ratio.exp()
    if settings.loss_type == "cispo":
        loss = -ratio.clamp(max=settings.epsilon_high).detach() * rows.advantage * logp
    else:
        capped = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
        clipped = ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)
        loss = -torch.min(capped * rows.advantage, clipped * rows.advantage)
    if settings.tis_cap is not None and rows.sampling is not None:
        loss = loss * (old - rows.sampling).exp().clamp(max=settings.tis_cap)
    kl = None
    if rows.ref is not None:
        kl = _kl(rows.ref - logp, settings.kl) * (ratio if settings.use_bias_correction_kl else 1)
        if settings.beta > 0:
            loss = loss + settings.beta * kl
    return TokenLoss(loss, ratio.detach(), None if kl is None else kl.detach())


def coefficients(logp: Tensor, rows: Rows, settings: GRPOSettings) -> Tensor:
    """Return d loss / d logp [n]."""
    with torch.enable_grad():
        leaf = logp.detach().requires_grad_()
        loss = token_losses(leaf, rows, settings).loss @ rows.weight
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def loss_and_metrics(
    logp: Tensor, rows: Rows, settings: GRPOSettings, entropy: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (loss [], metrics) of all rows as the ops do, with `entropy` [n] if given."""
    token = token_losses(logp, rows, settings)
    loss = (token.loss * rows.weight).sum()  # pairwise summation, unlike a dot product
    with torch.no_grad():
        metrics = _metrics(logp, token, rows, settings)
    if entropy is not None:
        metrics["entropy"] = entropy.detach().sum() / max(entropy.numel(), 1)
        if settings.entropy_coef != 0:
            loss = loss - settings.entropy_coef * (entropy * rows.weight).sum()
    return loss, metrics


def _kl(log_ratio_to_policy: Tensor, estimator: str) -> Tensor:
    d = log_ratio_to_policy  # [n] ref - logp
    if estimator == "k1":
        return -d
    return d.square() / 2 if estimator == "k2" else d.exp() - d - 1


def _metrics(logp: Tensor, token: TokenLoss, rows: Rows, settings: GRPOSettings) -> dict[str, Tensor]:
    count = max(logp.numel(), 1)
    ratio, advantage = token.ratio, rows.advantage
    if settings.loss_type == "cispo":
        low, high = logp.new_zeros(()), ((ratio > settings.epsilon_high) & (advantage > 0)).sum() / count
    else:
        low = ((ratio < 1 - settings.epsilon_low) & (advantage < 0)).sum() / count
        high = ((ratio > 1 + settings.epsilon_high) & (advantage > 0)).sum() / count
    return {
        "kl": logp.new_zeros(()) if token.kl is None else token.kl.sum() / count,
        "clip_low": low,
        "clip_high": high,
        "ratio_max": ratio.max() if ratio.numel() else logp.new_zeros(()),
        "logp": logp.detach(),
        "tokens": logp.new_full((), logp.numel(), dtype=torch.int64),
        "dropped_rows": logp.new_zeros((), dtype=torch.int64),
    }
