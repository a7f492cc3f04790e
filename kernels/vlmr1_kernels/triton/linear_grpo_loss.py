"""Fused output head and GRPO loss: chunks are projected and turned into loss and gradient, which GEMMs consume.

GEMMs per row: one without gradient, two with a frozen head, three with a trained one. At sequence level the gradient
of a row needs the whole sequence. With a frozen head and no entropy bonus d_hidden is computed for a coefficient of 1
and multiplied afterwards (still two GEMMs). With a trained head the rows are projected again (four GEMMs), unless one
chunk holds them all.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.inputs import HeadInputs, LossInputs, Needs
from vlmr1_kernels.settings import GRPOSettings
from vlmr1_kernels.triton.grpo_loss import objective
from vlmr1_kernels.triton.head import Head
from vlmr1_kernels.triton.launch import contiguous_aligned, on_tensor_device
from vlmr1_kernels.triton.objective import log_ratio_and_tis_weight, loss_constexprs, loss_scalars, token_loss
from vlmr1_kernels.triton.sequences import sequence_table
from vlmr1_kernels.triton.softmax import row_statistics, write_gradient


@triton.jit(do_not_specialize=["first", "vocabulary"])
def loss_kernel(
    logits, d_logits, stride, targets, first, vocabulary, head, ids, table, row_logps, loss_scalars, factor,
    logp, entropy, DEFERRED: tl.constexpr, CISPO: tl.constexpr, KL: tl.constexpr, CORRECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write log-prob, entropy and gradient of the logits of a row: of its loss, or if DEFERRED of its log-prob."""
    row = first + tl.program_id(0)
    offset = tl.program_id(0).to(tl.int64) * stride
    target, sequence = tl.load(targets + row), tl.load(ids + row)
    _, _, advantages, weights = table
    advantage, weight = tl.load(advantages + sequence), tl.load(weights + sequence) * factor
    peak, log_sum, mean, value = row_statistics(
        logits + offset, target, stride, vocabulary, head, tl.constexpr(True), BLOCK
    )
    tl.store(logp + row, value)
    tl.store(entropy + row, mean)

    slope, entropy_slope = factor, None
    if not DEFERRED:
        log_ratio, tis_weight = log_ratio_and_tis_weight(value, row, None, row_logps, loss_scalars)
        _, slope, _, _ = token_loss(
            value, log_ratio, tis_weight, tis_weight, None, advantage, row, None, row_logps, loss_scalars,
            CISPO, KL, CORRECTED,
        )  # fmt: skip
        slope *= weight
        _, _, _, _, _, entropy_coef = loss_scalars
        if entropy_coef is not None:
            entropy_slope = -entropy_coef * weight
    write_gradient(
        logits + offset, d_logits + offset, target, stride, vocabulary,
        peak, log_sum, mean, slope, entropy_slope, head, BLOCK,
    )  # fmt: skip


@on_tensor_device
def _forward(
    head_inputs: HeadInputs, rows: Tensor | None, inputs: LossInputs, chunks: Sequence[int], scale: float, needs: Needs,
    settings: GRPOSettings,
) -> tuple[Tensor, ...]:  # fmt: skip
    hidden = head_inputs.hidden
    several = len(hidden) > chunks[0]
    deferred = settings.sequence_level and needs == (True, False, False) and settings.entropy_coef == 0 and several
    head = Head(head_inputs, chunks, needs, torch.float32 if deferred else None)

    seq_ids, *row_logps = contiguous_aligned(inputs.seq_ids, *inputs.row_logps)
    row_logps = tuple(row_logps)
    ids = seq_ids if rows is None else seq_ids[rows]
    table = sequence_table(seq_ids, ids, inputs, settings)
    logp, entropy, lse = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))  # [n]

    in_one_pass = any(needs) and (deferred or not settings.sequence_level)
    factor = (1 if deferred else scale) / settings.temperature
    row = (ids, tuple(table), row_logps, loss_scalars(settings), factor, logp, entropy)
    constants = {"DEFERRED": deferred, **loss_constexprs(settings)}
    for block in head.blocks:
        for part in block:
            head.project(part)
            if in_one_pass:
                head.run(loss_kernel, part, head.gradient_buffers(part), *row, **constants)
            else:
                head.statistics(part, logp, entropy, lse)
        if in_one_pass:
            head.consume(block)
    result = objective(logp, entropy, table, row_logps, settings, settings.sequence_level and any(needs))

    d_logp = None if result.d_logp is None else result.d_logp.mul_(scale)
    if d_logp is not None and not deferred:
        d_entropy = table.weight[ids] * (-settings.entropy_coef * scale) if settings.entropy_coef != 0 else None
        for block in head.blocks:
            for part in block:
                if several:
                    head.project(part)
                head.gradient(part, lse, entropy, d_logp, d_entropy)
            head.consume(block)
    gradients = head.gradients(d_logp[:, None] if d_logp is not None and deferred else None)
    metrics = (result.kl, result.clip_low, result.clip_high, result.ratio_max)
    return result.loss, *gradients, logp, entropy.sum() / max(len(entropy), 1), *metrics


linear_grpo_loss = custom_ops.linear_grpo_loss("triton", _forward)
