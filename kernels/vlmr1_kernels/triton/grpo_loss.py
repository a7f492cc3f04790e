"""The GRPO objective on given log-probs: one program a sequence, no atomics, no synchronization."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels import functions
from vlmr1_kernels.settings import GRPOSettings
from vlmr1_kernels.triton.launch import launch, on_its_device, readable
from vlmr1_kernels.triton.objective import importance, limits, switches, token_loss
from vlmr1_kernels.triton.sequences import Sequences, sequences

BLOCK = 512


class Objective(NamedTuple):
    loss: Tensor  # []
    d_logp: Tensor | None  # [n]
    kl: Tensor  # [] and so on
    clip_low: Tensor
    clip_high: Tensor
    ratio_max: Tensor


@triton.jit(do_not_specialize=["sequences"])
def objective_kernel(
    logp, entropy, table, others, limits, sequences, d_logp, sums,
    CISPO: tl.constexpr, KL: tl.constexpr, SEQUENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [5, B]: per sequence its loss, kl, rows clipped low and high, and largest ratio."""
    sequence = tl.program_id(0)
    first, length, advantages, weights = table
    low, high, _, _, _, entropy_coef = limits
    begin, end = tl.load(first + sequence), tl.load(first + sequence + 1)
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    advantage, weight = zeros + tl.load(advantages + sequence), tl.load(weights + sequence)

    mean_ratio = 0.0
    mean_trust = 1.0
    if SEQUENCE:
        ratios, trusts = zeros, zeros
        for start in range(begin, end, BLOCK):
            row = start + lanes
            mask = row < end
            log_ratio, trust = importance(tl.load(logp + row, mask=mask).to(tl.float32), row, mask, others, limits)
            ratios += tl.where(mask, log_ratio, 0.0)
            trusts += tl.where(mask, trust, 0.0)
        rows = tl.load(length + sequence)
        mean_ratio, mean_trust = tl.sum(ratios, 0) / rows, tl.sum(trusts, 0) / rows

    losses, kls, lows, highs, ratio_max = zeros, zeros, zeros, zeros, zeros - float("inf")
    for start in range(begin, end, BLOCK):
        row = start + lanes
        mask = row < end
        value = tl.load(logp + row, mask=mask).to(tl.float32)
        log_ratio, trust = importance(value, row, mask, others, limits)
        spread = trust
        if SEQUENCE:
            log_ratio, spread = zeros + mean_ratio, zeros + mean_trust
        loss, slope, ratio, kl = token_loss(
            value, log_ratio, trust, spread, advantage, row, mask, others, limits, CISPO, KL
        )
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
    table: Sequences,
    others: tuple[Tensor | None, ...],
    settings: GRPOSettings,
    needs_gradient: bool,
) -> Objective:
    """Of n rows, all contiguous; `others` are old, ref and sampling log-probs [n] or None."""
    rows, count = logp.numel(), table.weight.numel()
    d_logp = torch.empty_like(logp, dtype=torch.float32) if needs_gradient else None
    if rows == 0:
        loss, *metrics = (logp.new_zeros((), dtype=torch.float32) for _ in range(5))
        return Objective(loss, d_logp, *metrics)
    sums = torch.empty(5, count, dtype=torch.float32, device=logp.device)
    launch(
        objective_kernel, count, logp, entropy, tuple(table), others, limits(settings), count, d_logp, sums,
        SEQUENCE=settings.sequence_level, BLOCK=BLOCK, **switches(settings),
    )  # fmt: skip
    loss, kl, clip_low, clip_high = sums[:4].sum(1).unbind()
    return Objective(loss, d_logp, kl / rows, clip_low / rows, clip_high / rows, sums[4].amax())


@on_its_device
def _forward(
    logp: Tensor,
    seq_ids: Tensor,
    advantages: Tensor | None,
    rewards: Tensor | None,
    num_generations: int,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
    normalizer: Tensor | None,
    settings: GRPOSettings,
) -> tuple[Any, ...]:
    logp, seq_ids, *others = readable(logp, seq_ids, old_logp, ref_logp, sampling_logp)
    table = sequences(seq_ids, seq_ids, advantages, rewards, num_generations, normalizer, settings)
    return tuple(objective(logp, None, table, tuple(others), settings, True))


grpo_loss = functions.grpo_loss("triton", _forward)
