"""Chunk and consume: project a chunk, turn its logits into loss and gradient, multiply, forget.

GEMMs a chunk: one without gradient; two with a frozen head; three with a trained one. At sequence level the
gradient of a row needs the whole sequence. With a frozen head and no entropy bonus the rows of d_hidden are made
for a coefficient of one and multiplied afterwards: two GEMMs still. With a trained head the rows are projected
once more, four GEMMs, unless one chunk holds them all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels import functions
from vlmr1_kernels.settings import GRPOSettings
from vlmr1_kernels.triton.grpo_loss import objective
from vlmr1_kernels.triton.head import Head
from vlmr1_kernels.triton.launch import on_its_device, readable
from vlmr1_kernels.triton.objective import importance, limits, switches, token_loss
from vlmr1_kernels.triton.sequences import Sequences, sequences
from vlmr1_kernels.triton.softmax import row_statistics, write_gradient


@triton.jit(do_not_specialize=["first", "vocabulary"])
def loss_kernel(
    logits, d_logits, stride, targets, first, vocabulary, head, ids, table, others, limits, factor, logp, entropy,
    DEFERRED: tl.constexpr, CISPO: tl.constexpr, KL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-prob and entropy of a row, and the gradient of its logits. Deferred: that of the log-prob itself."""
    row = first + tl.program_id(0)
    skipped = tl.program_id(0).to(tl.int64) * stride
    target, sequence = tl.load(targets + row), tl.load(ids + row)
    _, _, advantages, weights = table
    advantage, weight = tl.load(advantages + sequence), tl.load(weights + sequence) * factor
    peak, log_sum, mean, value = row_statistics(
        logits + skipped, target, stride, vocabulary, head, tl.constexpr(True), BLOCK
    )
    tl.store(logp + row, value)
    tl.store(entropy + row, mean)

    slope, entropy_slope = factor, None
    if not DEFERRED:
        log_ratio, trust = importance(value, row, None, others, limits)
        _, slope, _, _ = token_loss(value, log_ratio, trust, trust, advantage, row, None, others, limits, CISPO, KL)
        slope *= weight
        _, _, _, _, _, entropy_coef = limits
        if entropy_coef is not None:
            entropy_slope = -entropy_coef * weight
    write_gradient(
        logits + skipped, d_logits + skipped, target, stride, vocabulary,
        peak, log_sum, mean, slope, entropy_slope, head, BLOCK,
    )  # fmt: skip


@on_its_device
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    seq_ids: Tensor,
    rows: Tensor | None,
    advantages: Tensor | None,
    rewards: Tensor | None,
    num_generations: int,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sampling_logp: Tensor | None,
    normalizer: Tensor | None,
    softcap: float | None,
    chunk: int,
    scale: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    settings: GRPOSettings,
) -> tuple[Tensor, ...]:
    needs = (needs_hidden, needs_weight, needs_bias)
    several = len(hidden) > chunk
    deferred = settings.sequence_level and needs == (True, False, False) and settings.entropy_coef == 0 and several
    wide = torch.float32 if deferred else None
    head = Head(hidden, weight, bias, targets, settings.temperature, softcap, chunk, needs, wide)

    seq_ids, *others = readable(seq_ids, old_logp, ref_logp, sampling_logp)
    others = tuple(others)
    ids = seq_ids if rows is None else seq_ids[rows]
    table = sequences(seq_ids, ids, advantages, rewards, num_generations, normalizer, settings)
    logp, entropy, lse = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))  # [n]

    in_one_pass = any(needs) and (deferred or not settings.sequence_level)
    for part in head.chunks:
        head.project(part)
        if in_one_pass:
            _loss_and_gradient(head, part, ids, table, others, logp, entropy, scale, deferred, settings)
            head.consume(part)
        else:
            head.statistics(part, logp, entropy, lse)
    result = objective(logp, entropy, table, others, settings, settings.sequence_level and any(needs))

    d_logp = None if result.d_logp is None else result.d_logp.mul_(scale)
    if d_logp is not None and not deferred:
        d_entropy = table.weight[ids] * (-settings.entropy_coef * scale) if settings.entropy_coef != 0 else None
        for part in head.chunks:
            if several:
                head.project(part)
            head.gradient(part, lse, entropy, d_logp, d_entropy)
            head.consume(part)
    gradients = head.gradients(d_logp[:, None] if d_logp is not None and deferred else None)
    metrics = (result.kl, result.clip_low, result.clip_high, result.ratio_max)
    return result.loss, *gradients, logp, entropy.sum() / max(len(entropy), 1), *metrics


def _loss_and_gradient(
    head: Head,
    part: slice,
    ids: Tensor,
    table: Sequences,
    others: tuple[Tensor | None, ...],
    logp: Tensor,
    entropy: Tensor,
    scale: float,
    deferred: bool,
    settings: GRPOSettings,
) -> None:
    factor = (1 if deferred else scale) / settings.temperature
    head.run(
        loss_kernel, part, (head.logits, head.d_logits), ids, tuple(table), others, limits(settings), factor,
        logp, entropy, DEFERRED=deferred, **switches(settings),
    )  # fmt: skip


linear_grpo_loss = functions.linear_grpo_loss("triton", _forward)
