"""Full attention within each sequence: one flash call."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmr1_kernels.flash import kernels
from vlmr1_kernels.flash.kernels import loadable, rows_outermost


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, *, scale: float) -> Tensor:
    return _VarlenAttention.apply(q, k, v, cu_seqlens, max_length, scale)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scale: float) -> Tensor:
        q, k, v = rows_outermost(q), loadable(k), loadable(v)
        out, lse = kernels.varlen_forward(q, k, v, offsets, offsets, longest, longest, False, scale)
        ctx.save_for_backward(q, k, v, out, lse, offsets)
        ctx.longest, ctx.scale = longest, scale
        return out.transpose(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, offsets = ctx.saved_tensors
        gradients = kernels.varlen_backward(
            rows_outermost(d_out), q, k, v, out, lse, offsets, offsets, ctx.longest, ctx.longest, False, ctx.scale
        )
        return *(gradient.transpose(0, 1)[None] for gradient in gradients), None, None, None
