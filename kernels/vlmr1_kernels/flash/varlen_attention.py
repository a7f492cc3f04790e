"""Attention within each sequence as one flash call."""

from functools import partial

from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.flash.kernels import KERNELS, empty_gradients, to_varlen, to_varlen_row_major


def _forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, scale: float
) -> tuple[Tensor, Tensor]:
    spans = cu_seqlens, cu_seqlens, max_length, max_length
    out, lse = KERNELS[name].forward(to_varlen_row_major(q), to_varlen(k), to_varlen(v), *spans, False, scale)
    return out.transpose(0, 1)[None], lse


def _backward(
    name: str, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_length: int, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    spans = cu_seqlens, cu_seqlens, max_length, max_length
    d_out, q, out = (to_varlen_row_major(x) for x in (d_out, q, out))
    gradients = KERNELS[name].backward(d_out, q, to_varlen(k), to_varlen(v), out, lse, *spans, False, scale)
    return tuple(gradient.transpose(0, 1)[None] for gradient in gradients)


_RUN = {
    name: custom_ops.attention(
        "varlen_attention", name, "Tensor cu_seqlens, SymInt max_length", partial(_forward, name),
        partial(_backward, name), empty_gradients,
    )
    for name in KERNELS
}  # fmt: skip


def _attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, *, scale: float
) -> Tensor:
    return _RUN[name](q, k, v, cu_seqlens, max_length, scale)


flash, flash3, flash4 = (partial(_attention, name) for name in KERNELS)
