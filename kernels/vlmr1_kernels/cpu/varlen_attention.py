"""Attention within each sequence on torch's CPU flash kernels; adjacent sequences of equal length are one call.

Sorting the sequences into fewer calls does not pay: the copies take longer than the calls they save.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from vlmr1_kernels import custom_ops

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, *, scale: float) -> Tensor:
    return _run(q, k, v, cu_seqlens, scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    outs, sums = [], []
    for run in _runs(cu_seqlens):
        out, lse = _flash(*(_batch(x, *run) for x in (q, k, v)), 0.0, False, scale=scale)  # [S, H, n, Dh], [S, H, n]
        outs.append(_rows(out))
        sums.append(lse.transpose(0, 1).flatten(1).contiguous())
    return _joined(outs), sums[0] if len(sums) == 1 else torch.cat(sums, 1)


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, ...]:
    parts = []
    for run in _runs(cu_seqlens):
        given = (_batch(x, *run) for x in (d_out, q, k, v, out))
        found = _flash_backward(*given, _batch(lse[None, ..., None], *run)[..., 0], 0.0, False, scale=scale)
        parts.append([_rows(gradient) for gradient in found])
    return tuple(_joined(rows) for rows in zip(*parts, strict=True))


def _runs(cu_seqlens: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield the first row, number and length of adjacent sequences of equal length."""
    start = 0
    for length, run in groupby(filter(None, cu_seqlens.diff().tolist())):
        count = len(list(run))
        yield start, count, length
        start += count * length


def _batch(x: Tensor, start: int, count: int, length: int) -> Tensor:
    """Return rows of [1, H, L, Dh] as [count, H, length, Dh]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)


def _rows(batch: Tensor) -> Tensor:
    """Return [S, H, n, Dh] as [S * n, H, Dh], which is how the kernels lay it out."""
    return batch.transpose(1, 2).flatten(0, 1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    rows = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return rows.transpose(0, 1).unsqueeze(0)


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))


_run = custom_ops.attention("varlen_attention", "cpu", "Tensor cu_seqlens", _forward, _backward, _empty_gradients)
