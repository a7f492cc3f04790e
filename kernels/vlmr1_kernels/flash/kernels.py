"""Variable-length flash attention of the flash-attn package if it is installed, else of torch.

The rows of S sequences are concatenated. Sequence s has the rows cu[s]..cu[s+1] - 1, with separate int32 [S + 1] device
tensors for queries and keys. The log-sum-exp is [H, rows] float32.
"""

from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import Tensor

# Older versions pad the log-sum-exp and take other arguments; builds of version 3 have no such module.
_PACKAGE_SINCE, _PACKAGE_BEFORE = (2, 7), (3,)


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out [Lq, H, Dh] and log-sum-exp [H, Lq] of q [Lq, H, Dh] and k, v [Lk, Hkv, Dh]."""
    if _has_package():
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward  # pyright: ignore[reportMissingImports]

        out, lse, *_ = _flash_attn_varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal=causal)
        return out, lse
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale
    )
    return out, lse


def varlen_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return d_q, d_k, d_v of attention with probabilities exp(scale q k^T - lse) and output `out`.

    `lse` [H, Lq], contiguous, and `out` may be those of an attention over more keys."""
    if _has_package():
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


@lru_cache(maxsize=1)
def _has_package() -> bool:
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return False
    if not _PACKAGE_SINCE <= tuple(int(part) for part in version.split(".")[:2]) < _PACKAGE_BEFORE:
        return False
    return find_spec("flash_attn") is not None and find_spec("flash_attn.flash_attn_interface") is not None


def to_varlen_row_major(x: Tensor) -> Tensor:
    """Return [1, H, L, Dh] as [L, H, Dh] with rows first in memory; a view if possible, else a copy."""
    rows = x[0].transpose(0, 1)
    return rows if rows.stride(0) >= rows.stride(1) and _is_aligned(rows) else _copy(rows)


def to_varlen(x: Tensor) -> Tensor:
    """Return [1, H, L, Dh] as [L, H, Dh], in any memory order of heads and rows; a view if possible, else a copy."""
    rows = x[0].transpose(0, 1)
    return rows if _is_aligned(rows) else _copy(rows)


def _copy(rows: Tensor) -> Tensor:
    return rows.clone(memory_format=torch.contiguous_format)


def _is_aligned(rows: Tensor) -> bool:
    """Return whether the kernels can load the rows: 16 bytes at a time."""
    offsets = (*rows.stride()[:-1], rows.storage_offset())
    return rows.stride(-1) == 1 and all(offset % 8 == 0 for offset in offsets)
