"""The GRPO loss of given log-probs: one program per sequence, without atomics or synchronization."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.inputs import LossInputs
from vlmr1_kernels.settings import GRPOSettings
from vlmr1_kernels.triton.launch import contiguous_aligned, launch, on_tensor_device
from vlmr1_kernels.triton.objective import (
    kl_divergence,
    log_ratio_and_tis_weight,
    loss_constexprs,
    loss_scalars,
    token_loss,
)
from vlmr1_kernels.triton.sequences import SequenceTable, sequence_table

BLOCK = 512


class Objective(NamedTuple):
    """Loss, its gradient and metrics; all but d_logp are []."""

    loss: Tensor
    d_logp: Tensor | None  # [n]
    kl: Tensor
    clip_low: Tensor
    clip_high: Tensor
    ratio_max: Tensor


@triton.jit(do_not_specialize=["sequences"])
def objective_kernel(
    logp, entropy, table, row_logps, loss_scalars, sequences, d_logp, sums,
    CISPO: tl.constexpr, KL: tl.constexpr, CORRECTED: tl.constexpr, SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write sums [5, B]: loss, kl, rows clipped low, rows clipped high and largest ratio of each sequence."""
    sequence = tl.program_id(0)
    first, length, advantages, weights = table
    low, high, _, _, _, entropy_coef = loss_scalars
    _, ref, _ = row_logps
    begin, end = tl.load(first + sequence), tl.load(first + sequence + 1)
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    advantage, weight = zeros + tl.load(advantages + sequence), tl.load(weights + sequence)

    mean_log_ratio = 0.0
    mean_tis_weight = 1.0
    mean_kl = None
    if SEQUENCE:
        ratios, tis_weights, kls = zeros, zeros, zeros
        for start in range(begin, end, BLOCK):
            row = start + lanes
            mask = row < end
            value = tl.load(logp + row, mask=mask).to(tl.float32)
            log_ratio, tis_weight = log_ratio_and_tis_weight(value, row, mask, row_logps, loss_scalars)
            ratios += tl.where(mask, log_ratio, 0.0)
            tis_weights += tl.where(mask, tis_weight, 0.0)
            if CORRECTED and ref is not None:
                kl, _ = kl_divergence(tl.load(ref + row, mask=mask).to(tl.float32) - value, KL)
                kls += tl.where(mask, kl, 0.0)
        rows = tl.load(length + sequence)
        mean_log_ratio, mean_tis_weight = tl.sum(ratios, 0) / rows, tl.sum(tis_weights, 0) / rows
        mean_kl = tl.sum(kls, 0) / rows

    losses, kls, lows, highs, ratio_max = zeros, zeros, zeros, zeros, zeros - float("inf")
    for start in range(begin, end, BLOCK):
        row = start + lanes
        mask = row < end
        value = tl.load(logp + row, mask=mask).to(tl.float32)
        log_ratio, tis_weight = log_ratio_and_tis_weight(value, row, mask, row_logps, loss_scalars)
        spread = tis_weight
        if SEQUENCE:
            log_ratio, spread = zeros + mean_log_ratio, zeros + mean_tis_weight
        loss, slope, ratio, kl = token_loss(
            value, log_ratio, tis_weight, spread, mean_kl, advantage, row, mask, row_logps, loss_scalars,
            CISPO, KL, CORRECTED,
        )  # fmt: skip
        if d_logp is not None:
            tl.store(d_logp + row, slope * weight, mask=mask)
        if entropy_coef is not None:
            loss -= entropy_coef * tl.load(entropy + row, mask=mask)
        losses += tl.where(mask, loss * weight, 0.0)
        kls += tl.where(mask, kl, 0.0)
        if not CISPO:
            lows += tl.where(mask & (ratio < low) & (advantage < 0), 1.0, 0.0)
        highs += tl.where(mask & (ratio > high) & (advantage > 0), 1.0, 0.0)
        ratio_max = tl.maximum(ratio_max, tl.where(mask, ratio, float("-inf")))
    tl.store(sums + sequence, tl.sum(losses, 0))
    tl.store(sums + sequences + sequence, tl.sum(kls, 0))
    tl.store(sums + 2 * sequences + sequence, tl.sum(lows, 0))
    tl.store(sums + 3 * sequences + sequence, tl.sum(highs, 0))
    tl.store(sums + 4 * sequences + sequence, tl.max(ratio_max, 0))


def objective(
    logp: Tensor,
    entropy: Tensor | None,
    table: SequenceTable,
    row_logps: tuple[Tensor | None, ...],
    settings: GRPOSettings,
    needs_gradient: bool,
) -> Objective:
    """Return the objective of n rows; `row_logps` are old, ref and sampling log-probs [n] or None, contiguous."""
    rows, count = logp.numel(), table.weight.numel()
    d_logp = torch.empty_like(logp, dtype=torch.float32) if needs_gradient else None
    if rows == 0:
        loss, *metrics = (logp.new_zeros((), dtype=torch.float32) for _ in range(5))
        return Objective(loss, d_logp, *metrics)
    sums = torch.empty(5, count, dtype=torch.float32, device=logp.device)
    launch(
        objective_kernel, count, logp, entropy, tuple(table), row_logps, loss_scalars(settings), count, d_logp, sums,
        SEQUENCE=settings.sequence_level, BLOCK=BLOCK, **loss_constexprs(settings),
    )  # fmt: skip
    loss, kl, clip_low, clip_high = sums[:4].sum(1).unbind()
    return Objective(loss, d_logp, kl / rows, clip_low / rows, clip_high / rows, sums[4].amax())


@on_tensor_device
def _forward(logp: Tensor, inputs: LossInputs, settings: GRPOSettings) -> tuple[Any, ...]:
    seq_ids, logp, *row_logps = contiguous_aligned(inputs.seq_ids, logp, *inputs.row_logps)
    table = sequence_table(seq_ids, seq_ids, inputs, settings)
    return tuple(objective(logp, None, table, tuple(row_logps), settings, True))


grpo_loss = custom_ops.grpo_loss("triton", _forward)
