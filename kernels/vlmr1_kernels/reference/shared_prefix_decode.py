"""Attention of one decode step, in which the branches of a group share one GEMM over their prefix.

Offsets and lengths are read on the host, which on a GPU waits for the device.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vlmr1_kernels import custom_decode_ops
from vlmr1_kernels.inputs import DecodeTables
from vlmr1_kernels.linear import accumulation_dtype


class Group(NamedTuple):
    """A group with at least one branch."""

    first: int  # branch
    last: int  # branch, exclusive
    start: int  # row of the prefix
    length: int  # rows of the prefix


def _forward(
    q: Tensor, keys: Tensor, values: Tensor, tables: DecodeTables, *,
    block: int, max_group: int, max_prefix: int, scale: float,
) -> Tensor:  # fmt: skip
    groups = _groups(tables, max_group, max_prefix)
    if not groups:
        return torch.zeros_like(q)
    batch, heads, head_dim = q.shape
    branches, kv_heads = groups[-1].last, len(keys)  # n; the rows after them are padding
    folded = heads // kv_heads
    # Adjacent rows: the queries of a group, and of the query heads that share a key head: [Hkv, n * H / Hkv, Dh].
    rows = (q[:branches] * scale).view(branches, kv_heads, folded, head_dim).transpose(0, 1).contiguous().flatten(1, 2)
    own = (kv_heads * branches, folded, -1)  # shape of the rows by branch
    parts = [slice(group.first * folded, group.last * folded) for group in groups]

    lengths = tables.suffix_lengths[:branches].tolist()
    longest, suffix = max(group.length for group in groups), max(lengths)  # Lmax, T
    scores = rows.new_empty(kv_heads, branches * folded, longest + suffix)
    for part, (_, _, start, length) in zip(parts, groups, strict=True):
        scores[:, part, :length] = torch.bmm(rows[:, part], keys[:, start : start + length].mT)
        if length < longest:
            scores[:, part, length:longest] = -torch.inf
    if suffix:
        read, masked = _suffix_rows(tables.suffix_blocks[:branches], lengths, suffix, block, groups)
        suffix_keys, suffix_values = (x.index_select(1, read).view(-1, suffix, head_dim) for x in (keys, values))
        on_suffix = torch.bmm(rows.view(own), suffix_keys.mT)  # [Hkv * n, H / Hkv, T]
        if masked is not None:
            on_suffix.view(kv_heads, branches, folded, suffix).masked_fill_(masked[:, None], -torch.inf)
        scores[:, :, longest:] = on_suffix.view(kv_heads, -1, suffix)
    weights = torch.softmax(scores, dim=-1, dtype=accumulation_dtype(q.dtype)).to(q.dtype)

    out = torch.empty_like(rows)
    for part, (_, _, start, length) in zip(parts, groups, strict=True):
        torch.bmm(weights[:, part, :length], values[:, start : start + length], out=out[:, part])
    if suffix:
        out += torch.bmm(weights[:, :, longest:].reshape(own), suffix_values).view_as(out)
    out = out.view(kv_heads, branches, folded, head_dim).transpose(0, 1).reshape(branches, heads, head_dim).contiguous()
    return torch.cat([out, out.new_zeros(batch - branches, heads, head_dim)]) if branches < batch else out


def _groups(tables: DecodeTables, max_group: int, max_prefix: int) -> list[Group]:
    offsets, starts, lengths = (table.tolist() for table in tables[:3])
    runs = zip(pairwise(offsets), starts, lengths, strict=True)
    groups = [Group(first, last, start, length) for (first, last), start, length in runs if first < last]
    for first, last, _, length in groups:
        if last - first > max_group or length > max_prefix:
            raise ValueError(
                f"a group has {last - first} branches and {length} rows, max_group is {max_group}, "
                f"max_prefix is {max_prefix}"
            )
    return groups


def _suffix_rows(
    suffix_blocks: Tensor, lengths: list[int], suffix: int, block: int, groups: list[Group]
) -> tuple[Tensor, Tensor | None]:
    """Return the cache rows of all suffixes [n * T], and a mask [n, T] of those beyond their branch's length.

    Masked rows point to the first row of the prompt: uninitialized rows may hold NaN, and 0 * NaN is NaN.
    """
    blocks = suffix_blocks[:, : -(-suffix // block), None] * block
    rows = (blocks + torch.arange(block, dtype=blocks.dtype, device=blocks.device)).flatten(1)[:, :suffix]  # [n, T]
    masked = None
    if min(lengths) < suffix:
        starts = [group.start for group in groups for _ in range(group.first, group.last)]
        ends, elsewhere = (torch.tensor(each, device=rows.device, dtype=rows.dtype) for each in (lengths, starts))
        masked = torch.arange(suffix, device=rows.device) >= ends[:, None]
        rows = torch.where(masked, elsewhere[:, None], rows)
    return rows.flatten(), masked


shared_prefix_decode = custom_decode_ops.shared_prefix_decode("reference", _forward)
