"""Attention within each sequence as one flash call."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmr1_kernels.flash import kernels
from vlmr1_kernels.flash.kernels import to_varlen, to_varlen_row_major


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, *, scale: float) -> Tensor:
    return _VarlenAttention.apply(q, k, v, cu_seqlens, max_length, scale)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float) -> Tensor:
        q, k, v = to_varlen_row_major(q), to_varlen(k), to_varlen(v)
        out, lse = kernels.varlen_forward(q, k, v, cu_seqlens, cu_seqlens, max_length, max_length, False, scale)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.max_length, ctx.scale = max_length, scale
        return out.transpose(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
        spans = cu_seqlens, cu_seqlens, ctx.max_length, ctx.max_length
        d_out = to_varlen_row_major(d_out)
        gradients = kernels.varlen_backward(d_out, q, k, v, out, lse, *spans, False, ctx.scale)
        return *(gradient.transpose(0, 1)[None] for gradient in gradients), None, None, None
