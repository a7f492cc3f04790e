"""Fused output head and GRPO loss, chunk by chunk: logits, loss, gradient, GEMMs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmr1_kernels.inputs import HeadInputs, LossInputs
from vlmr1_kernels.linear import accumulation_dtype, chunk_rows
from vlmr1_kernels.reference.objective import Rows, coefficients, loss_and_metrics, make_rows
from vlmr1_kernels.reference.softmax import Chunk, Head
from vlmr1_kernels.settings import GRPOSettings


def linear_grpo_loss(
    head: HeadInputs, inputs: LossInputs, *, settings: GRPOSettings, chunk_mib: float | None,
    active_rows: Tensor | None, accumulate_grad: bool,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    hidden, weight, bias, targets, _, softcap = head
    count, rows = len(hidden), make_rows(inputs, settings, accumulation_dtype(hidden.dtype))
    if active_rows is not None:
        hidden, targets, rows = hidden.index_select(0, active_rows), targets[active_rows], rows[active_rows]
    batch = _Batch(targets, rows, settings, softcap, chunk_rows(hidden, weight, chunk_mib)[0])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        loss, *values = _LinearGRPOLoss.apply(hidden, weight, bias, batch, accumulate_grad)
        metrics: dict[str, Tensor] = dict(zip(_METRICS, values, strict=True))
    else:
        loss, metrics = _evaluate(hidden, weight, bias, batch)
    if active_rows is not None:
        logp = metrics["logp"]
        metrics["logp"] = logp.new_full((count,), torch.nan).index_copy_(0, active_rows, logp)
        metrics["dropped_rows"] = count - metrics["tokens"]
        metrics["tokens"] = torch.full_like(metrics["tokens"], count)
    return loss, metrics


_METRICS = ("kl", "entropy", "clip_low", "clip_high", "ratio_max", "logp", "tokens", "dropped_rows")


@dataclass(frozen=True)
class _Batch:
    targets: Tensor  # [N]
    rows: Rows
    settings: GRPOSettings
    softcap: float | None
    chunk: int

    def head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> HeadInputs:
        return HeadInputs(hidden, weight, bias, self.targets, self.settings.temperature, self.softcap)

    def slices(self) -> list[slice]:
        return [slice(start, start + self.chunk) for start in range(0, len(self.targets), self.chunk)]


def _evaluate(hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: _Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and metrics without gradient, with one GEMM."""
    head = Head.of(batch.head(hidden, weight, bias))
    logp, entropy = torch.empty_like(batch.rows.weight), torch.empty_like(batch.rows.weight)
    with torch.no_grad():
        for part in batch.slices():
            chunk = Chunk(head, hidden[part], batch.targets[part])
            logp[part], entropy[part] = chunk.logp, chunk.entropy()
        return loss_and_metrics(logp, batch.rows, batch.settings, entropy)


class _LinearGRPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: _Batch, accumulate: bool
    ) -> tuple[Tensor, ...]:
        needs_hidden, *needs = ctx.needs_input_grad[:3]
        rows, settings, parts = batch.rows, batch.settings, batch.slices()
        inputs = batch.head(hidden, weight, bias)
        head = Head.of(inputs, *needs)
        logp, entropy = torch.empty_like(rows.weight), torch.empty_like(rows.weight)  # [N]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None

        d_logp = None  # [N], computed beforehand only at sequence level
        if settings.sequence_level and len(parts) > 1:
            for part in parts:
                logp[part] = Chunk(head, hidden[part], batch.targets[part]).logp
            d_logp = coefficients(logp, rows, settings)

        for part in parts:
            chunk = Chunk(head, hidden[part], batch.targets[part])
            logp[part], entropy[part] = chunk.logp, chunk.entropy()
            d_part = coefficients(chunk.logp, rows[part], settings) if d_logp is None else d_logp[part]
            d_entropy = -settings.entropy_coef * rows.weight[part] if settings.entropy_coef != 0 else None
            gradient = chunk.backward(d_part, d_entropy, entropy[part], needs_hidden)
            if d_hidden is not None and gradient is not None:
                d_hidden[part] = gradient

        loss, metrics = loss_and_metrics(logp, rows, settings, entropy)
        ctx.save_for_backward(d_hidden, *head.gradients(inputs))
        ctx.leaf = weight if accumulate and needs[0] else None
        values = tuple(metrics[name] for name in _METRICS)
        ctx.mark_non_differentiable(*values)
        return loss, *values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = (None if g is None else g * d_loss.to(g.dtype) for g in ctx.saved_tensors)
        if ctx.leaf is not None:
            ctx.leaf.grad = d_weight if ctx.leaf.grad is None else ctx.leaf.grad.add_(d_weight)
            d_weight = None
        return d_hidden, d_weight, d_bias, None, None
