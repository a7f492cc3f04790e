"""The block mask of a layout: which blocks of rows see which, made on the host from two key ranges a row."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vlmr1_kernels.layout import PrefixLayout

BLOCK = 128  # rows; what FlexAttention skips or masks as a whole


@dataclass(frozen=True)
class Tables:
    """Row i sees the keys own[i]..i, and first[i]..last[i] - 1 of the prompt of its branch; and the blocks that
    follow from that: how many are seen in part or in full, by query and by key block, and which, those first."""

    own: Tensor  # [L] int32
    first: Tensor
    last: Tensor
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
    """Cached, since every decoder layer asks again."""
    ranges = visible_ranges(layout, window)
    counts = _pairs(ranges)
    full = counts == BLOCK * BLOCK
    part = (counts > 0) & ~full
    blocks = (*_listed(part), *_listed(full), *_listed(part.T), *_listed(full.T))
    return Tables(*(table.to(device, torch.int32).contiguous() for table in (*ranges, *blocks)))


def visible_ranges(layout: PrefixLayout, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """own, first, last [L]."""
    own: list[int] = []
    for start, length in zip(layout.prompt_offsets, layout.prompt_lengths, strict=True):
        own += [_reach(row, start, window) for row in range(start, start + length)]
    first, last = [0] * len(own), [0] * len(own)
    groups = zip(layout.prompt_offsets, layout.prompt_lengths, layout.branch_lengths, strict=True)
    for prompt, rows, branches in groups:
        for branch in branches:
            start, end = len(own), prompt + rows
            own += [_reach(row, start, window) for row in range(start, start + branch)]
            # What a branch sees of its prompt, as if it stood right behind it.
            first += [min(_reach(row, prompt, window), end) for row in range(end, end + branch)]
            last += [end] * branch
    return torch.tensor(own), torch.tensor(first), torch.tensor(last)


def _reach(row: int, start: int, window: int | None) -> int:
    """The first row that `row` sees of a sequence that begins at `start`."""
    return start if window is None else max(start, row - window + 1)


def _pairs(ranges: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[n, n] visible pairs of rows of a query block and a key block."""
    own, first, last = (each[:, None] for each in ranges)  # [L, 1]
    rows = torch.arange(len(own))
    blocks = -(-len(own) // BLOCK)
    start = BLOCK * torch.arange(blocks)  # [n]

    def overlap(low: Tensor, high: Tensor) -> Tensor:
        return (torch.minimum(high, start + BLOCK) - torch.maximum(low, start)).clamp_(min=0)

    keys = overlap(own, rows[:, None] + 1) + overlap(first, last)  # [L, n]
    return torch.zeros(blocks, blocks, dtype=keys.dtype).index_add_(0, rows // BLOCK, keys)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[n, n] bool -> how many [1, 1, n] in each row, and where [1, 1, n, n], those first."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1)[None, None], order[None, None]
