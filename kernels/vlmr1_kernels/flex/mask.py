"""Block mask of a layout, computed on the host from two key ranges per row."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vlmr1_kernels.layout import PrefixLayout

BLOCK = 128  # rows of a block, which FlexAttention skips or masks as a whole


@dataclass(frozen=True)
class Tables:
    """Key ranges of each row and the block mask that follows from them.

    Row i attends to keys own_start[i]..i and prefix_start[i]..prefix_end[i] - 1. The block tables list, as in
    `BlockMask`, how many and which key blocks are partially or fully visible, by query block and by key block."""

    own_start: Tensor  # [L] int32
    prefix_start: Tensor
    prefix_end: Tensor
    key_counts: Tensor  # [1, 1, n] int32
    keys: Tensor  # [1, 1, n, n] int32
    full_key_counts: Tensor
    full_keys: Tensor
    query_counts: Tensor
    queries: Tensor
    full_query_counts: Tensor
    full_queries: Tensor


@lru_cache(maxsize=16)
def tables(layout: PrefixLayout, window: int | None, device: torch.device) -> Tables:
    """Return the tables of a layout, cached for the calls of all decoder layers."""
    ranges = visible_ranges(layout, window)
    counts = _pairs(ranges)
    full = counts == BLOCK * BLOCK
    part = (counts > 0) & ~full
    blocks = (*_listed(part), *_listed(full), *_listed(part.T), *_listed(full.T))
    return Tables(*(table.to(device, torch.int32).contiguous() for table in (*ranges, *blocks)))


def visible_ranges(layout: PrefixLayout, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return own_start, prefix_start and prefix_end [L] of each row."""
    own_start: list[int] = []
    for start, length in zip(layout.prompt_offsets, layout.prompt_lengths, strict=True):
        own_start += [_reach(row, start, window) for row in range(start, start + length)]
    prefix_start, prefix_end = [0] * len(own_start), [0] * len(own_start)
    groups = zip(layout.prompt_offsets, layout.prompt_lengths, layout.branch_lengths, strict=True)
    for prompt, rows, branches in groups:
        for branch in branches:
            start, end = len(own_start), prompt + rows
            own_start += [_reach(row, start, window) for row in range(start, start + branch)]
            # The window of a branch row on its prompt, as if the branch followed the prompt directly.
            prefix_start += [min(_reach(row, prompt, window), end) for row in range(end, end + branch)]
            prefix_end += [end] * branch
    return torch.tensor(own_start), torch.tensor(prefix_start), torch.tensor(prefix_end)


def _reach(row: int, start: int, window: int | None) -> int:
    """Return the first row of a sequence starting at `start` that `row` attends to."""
    return start if window is None else max(start, row - window + 1)


def _pairs(ranges: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the number [n, n] of visible (row, key) pairs of each query block and key block."""
    own_start, prefix_start, prefix_end = (each[:, None] for each in ranges)  # [L, 1]
    rows = torch.arange(len(own_start))
    blocks = -(-len(own_start) // BLOCK)
    start = BLOCK * torch.arange(blocks)  # [n]

    def overlap(low: Tensor, high: Tensor) -> Tensor:
        return (torch.minimum(high, start + BLOCK) - torch.maximum(low, start)).clamp_(min=0)

    keys = overlap(own_start, rows[:, None] + 1) + overlap(prefix_start, prefix_end)  # [L, n]
    return torch.zeros(blocks, blocks, dtype=keys.dtype).index_add_(0, rows // BLOCK, keys)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the count [1, 1, n] and the indices [1, 1, n, n], set ones first, of each row of blocks [n, n] bool."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1)[None, None], order[None, None]
