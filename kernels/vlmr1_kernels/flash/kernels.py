"""The variable-length flash kernels: those of the flash-attn package where it is installed, else torch's own.

Rows of S sequences lie behind one another; sequence s has the rows cu[s]..cu[s+1] of its side, both int32
[S + 1] on the device. Keys and values may have fewer heads than queries. The log-sum-exp is [H, rows] float32.
"""

from functools import lru_cache
from importlib import metadata

import torch
from torch import Tensor

_PACKAGE_SINCE = (2, 7)  # before, the log-sum-exp was padded and the arguments were others


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """q [Lq, H, Dh], k and v [Lk, Hkv, Dh] -> out [Lq, H, Dh], log-sum-exp of the scaled scores [H, Lq]."""
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
    """d_q, d_k, d_v of attention with the probabilities exp(scale q k^T - lse) and the output `out`.

    These may be those of a larger attention, of which the keys are a part. `lse` [H, Lq] is contiguous."""
    if _has_package():
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward  # pyright: ignore[reportMissingImports]

        d_q, d_k, d_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_varlen_backward(
            d_out, q, k, v, out, lse, d_q, d_k, d_v, cu_q, cu_k, max_q, max_k, 0.0, scale, causal,
            window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return d_q, d_k, d_v
    random_state = q.new_empty(2, dtype=torch.uint64)  # of dropout, which there is none of
    return torch.ops.aten._flash_attention_backward(
        d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, random_state, q.new_empty(0), scale=scale
    )


@lru_cache(maxsize=1)
def _has_package() -> bool:
    try:
        version = metadata.version("flash-attn")
    except metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2]) >= _PACKAGE_SINCE


def rows_outermost(x: Tensor) -> Tensor:
    """[1, H, L, Dh] -> [L, H, Dh]; a view where the memory has that order, and the kernels can load it."""
    rows = x[0].transpose(0, 1)
    return rows if rows.stride(0) >= rows.stride(1) and _loadable(rows) else _copy(rows)


def loadable(x: Tensor) -> Tensor:
    """[1, H, L, Dh] -> [L, H, Dh] in any order of heads and rows; a view where the kernels can load it."""
    rows = x[0].transpose(0, 1)
    return rows if _loadable(rows) else _copy(rows)


def _copy(rows: Tensor) -> Tensor:
    return rows.clone(memory_format=torch.contiguous_format)


def _loadable(rows: Tensor) -> bool:
    """They load 16 bytes at a time."""
    offsets = (*rows.stride()[:-1], rows.storage_offset())
    return rows.stride(-1) == 1 and all(offset % 8 == 0 for offset in offsets)
