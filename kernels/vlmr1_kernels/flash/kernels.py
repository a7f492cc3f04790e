"""Variable-length flash attention: of flash-attn 2 if it is installed, else of torch; of flash-attn 3; of flash-attn 4.

The rows of S sequences are concatenated. Sequence s has the rows cu[s]..cu[s+1] - 1, with separate int32 [S + 1] device
tensors for queries and keys. The log-sum-exp is [H, rows] float32.

Sources of the signatures, Dao-AILab/flash-attention at commit 0251105a: `flash_attn/flash_attn_interface.py`,
`hopper/flash_attn_interface.py` and `flash_attn/cute/interface.py`. The calls of versions 3 and 4 have never run: tests
check their arguments against these signatures.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlmr1_kernels.flash import packages


class Kernels(NamedTuple):
    """The two functions of a version.

    forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale)
        -> out [Lq, H, Dh] and log-sum-exp [H, Lq] of q [Lq, H, Dh] and k, v [Lk, Hkv, Dh]; contiguous
    backward(d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale)
        -> d_q, d_k, d_v of attention with probabilities exp(scale q k^T - lse) and output `out`, in the memory order of
        q, k, v. `lse` [H, Lq], contiguous, and `out` may be those of an attention over more keys.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if packages.missing(2) is None:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward  # pyright: ignore[reportMissingImports]

        out, lse, *_ = _flash_attn_varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal=causal)
        return out, lse
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
    )
    return out, lse


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if packages.missing(2) is None:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward  # pyright: ignore[reportMissingImports]

        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_varlen_backward(
            d_out, q, k, v, out, lse, d_q, d_k, d_v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return d_q, d_k, d_v
    random_state = q.new_empty(2, dtype=torch.uint64)  # of dropout, unused
    return torch.ops.aten._flash_attention_backward(
        d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, random_state, q.new_empty(0), scale=scale
    )


def _forward3(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from flash_attn_interface import _flash_attn_forward  # pyright: ignore[reportMissingImports]

    out, lse, *_ = _flash_attn_forward(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
        softmax_scale=scale, causal=causal,
    )  # fmt: skip
    return out, lse


def _backward3(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from flash_attn_interface import _flash_attn_backward  # pyright: ignore[reportMissingImports]

    d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_attn_backward(
        d_out, q, k, v, out, lse, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
        dq=d_q, dk=d_k, dv=d_v, softmax_scale=scale, is_causal=causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return d_q, d_k, d_v


def _forward4(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd  # pyright: ignore[reportMissingImports]

    out, lse, *_ = _flash_attn_fwd(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
        softmax_scale=scale, causal=causal, return_lse=True,
    )  # fmt: skip
    return out, lse


def _backward4(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from flash_attn.cute.interface import _flash_attn_bwd  # pyright: ignore[reportMissingImports]

    return _flash_attn_bwd(
        q, k, v, out, d_out, lse, softmax_scale=scale, causal=causal, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        max_seqlen_q=max_q, max_seqlen_k=max_k, deterministic=torch.are_deterministic_algorithms_enabled(),
        dq=torch.empty_like(q), dk=torch.empty_like(k), dv=torch.empty_like(v),
    )  # fmt: skip


KERNELS = {
    "flash": Kernels(_forward, _backward),
    "flash3": Kernels(_forward3, _backward3),
    "flash4": Kernels(_forward4, _backward4),
}


def to_varlen_row_major(x: Tensor) -> Tensor:
    """Return [1, H, L, Dh] as [L, H, Dh] with rows first in memory; a view if possible, else a copy."""
    rows = x[0].transpose(0, 1)
    return rows if rows.stride(0) >= rows.stride(1) and _is_aligned(rows) else _copy(rows)


def to_varlen(x: Tensor) -> Tensor:
    """Return [1, H, L, Dh] as [L, H, Dh], in any memory order of heads and rows; a view if possible, else a copy."""
    rows = x[0].transpose(0, 1)
    return rows if _is_aligned(rows) else _copy(rows)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Return tensors with the shapes and strides of the gradients of q, k, v."""
    rows = to_varlen_row_major(q), to_varlen(k), to_varlen(v)
    return tuple(torch.empty_like(x).transpose(0, 1)[None] for x in rows)


def _copy(rows: Tensor) -> Tensor:
    return rows.clone(memory_format=torch.contiguous_format)


def _is_aligned(rows: Tensor) -> bool:
    """Return whether the kernels can load the rows: 16 bytes at a time."""
    offsets = (*rows.stride()[:-1], rows.storage_offset())
    return rows.stride(-1) == 1 and all(offset % 8 == 0 for offset in offsets)
