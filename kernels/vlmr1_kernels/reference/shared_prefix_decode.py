"""One decode step in which a group reads its prefix once, and without copying it.

Offsets and lengths are read on the host: on a GPU that waits for the device.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from vlmr1_kernels.linear import accumulation_dtype


class Group(NamedTuple):
    """A group with branches: its first one and the one behind its last; the first row and the rows of its prompt."""

    first: int
    last: int
    start: int
    length: int


def shared_prefix_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    group_offsets: Tensor,
    prefix_starts: Tensor,
    prefix_lengths: Tensor,
    suffix_blocks: Tensor,
    suffix_lengths: Tensor,
    *,
    block: int,
    max_group: int,
    max_prefix: int,
    scale: float,
) -> Tensor:
    groups = _groups(group_offsets, prefix_starts, prefix_lengths, max_group, max_prefix)
    if not groups:
        return torch.zeros_like(q)
    batch, heads, head_dim = q.shape
    branches, kv_heads = groups[-1].last, len(keys)  # n; the rows behind them are padding
    folded = heads // kv_heads
    # The queries of a group, and of the heads that share a key head, are adjacent rows: [Hkv, n * H / Hkv, Dh].
    rows = (q[:branches] * scale).view(branches, kv_heads, folded, head_dim).transpose(0, 1).contiguous().flatten(1, 2)
    own = (kv_heads * branches, folded, -1)  # the same rows by branch
    parts = [slice(group.first * folded, group.last * folded) for group in groups]

    lengths = suffix_lengths[:branches].tolist()
    longest, suffix = max(group.length for group in groups), max(lengths)  # Lmax, T
    scores = rows.new_empty(kv_heads, branches * folded, longest + suffix)
    for part, (_, _, start, length) in zip(parts, groups, strict=True):
        scores[:, part, :length] = torch.bmm(rows[:, part], keys[:, start : start + length].mT)
        if length < longest:
            scores[:, part, length:longest] = -torch.inf
    if suffix:
        read, beyond = _suffix_rows(suffix_blocks[:branches], lengths, suffix, block, groups)
        suffix_keys, suffix_values = (x.index_select(1, read).view(-1, suffix, head_dim) for x in (keys, values))
        on_suffix = torch.bmm(rows.view(own), suffix_keys.mT)  # [Hkv * n, H / Hkv, T]
        if beyond is not None:
            on_suffix.view(kv_heads, branches, folded, suffix).masked_fill_(beyond[:, None], -torch.inf)
        scores[:, :, longest:] = on_suffix.view(kv_heads, -1, suffix)
    weights = torch.softmax(scores, dim=-1, dtype=accumulation_dtype(q.dtype)).to(q.dtype)

    out = torch.empty_like(rows)
    for part, (_, _, start, length) in zip(parts, groups, strict=True):
        torch.bmm(weights[:, part, :length], values[:, start : start + length], out=out[:, part])
    if suffix:
        out += torch.bmm(weights[:, :, longest:].reshape(own), suffix_values).view_as(out)
    out = out.view(kv_heads, branches, folded, head_dim).transpose(0, 1).reshape(branches, heads, head_dim)
    return torch.cat([out, out.new_zeros(batch - branches, heads, head_dim)]) if branches < batch else out


def _groups(
    group_offsets: Tensor, prefix_starts: Tensor, prefix_lengths: Tensor, max_group: int, max_prefix: int
) -> list[Group]:
    runs = zip(pairwise(group_offsets.tolist()), prefix_starts.tolist(), prefix_lengths.tolist(), strict=True)
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
    """The pool rows of all suffixes, [n * T], and which of them are beyond their branch's length, [n, T].

    There a branch reads the first row of its prompt: what nobody names may be NaN, which a weight of 0 would
    not undo.
    """
    blocks = suffix_blocks[:, : -(-suffix // block), None] * block
    rows = (blocks + torch.arange(block, dtype=blocks.dtype, device=blocks.device)).flatten(1)[:, :suffix]  # [n, T]
    beyond = None
    if min(lengths) < suffix:
        starts = [group.start for group in groups for _ in range(group.first, group.last)]
        ends, elsewhere = (torch.tensor(each, device=rows.device, dtype=rows.dtype) for each in (lengths, starts))
        beyond = torch.arange(suffix, device=rows.device) >= ends[:, None]
        rows = torch.where(beyond, elsewhere[:, None], rows)
    return rows.flatten(), beyond
