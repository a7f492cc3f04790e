"""Cases of one decode step, drawn into a pool where all that must not be read is NaN, and their oracle."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmr1_kernels.testing import assert_within_budget

Arguments = dict[str, Any]
ANYTHING = 2**30 + 7  # in the place of numbers that must not be read


@dataclass(frozen=True)
class Case:
    """Groups in one pool: rows of each prefix, branches of each group, tokens of each branch's suffix."""

    prefixes: tuple[int, ...]
    sizes: tuple[int, ...]
    suffixes: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block: int = 4
    blocks: int | None = None  # M; default: what the longest suffix needs, and one
    padding: int = 0  # branches of no group
    scale: float | None = None

    @property
    def branches(self) -> int:
        return sum(self.sizes)

    def draw(self) -> Arguments:
        """float64. The prefixes in reverse order and apart, then the blocks, shuffled; every other row is NaN."""
        batch, needed = self.branches + self.padding, -(-max(self.suffixes, default=0) // self.block)
        width = needed + 1 if self.blocks is None else self.blocks
        starts, row = [], 1
        for length in reversed(self.prefixes):
            starts.insert(0, row)
            row += length + 1
        first_block = -(-row // self.block)
        blocks = torch.randperm(batch * width).view(batch, width) + first_block
        rows = self.block * (first_block + batch * width)
        pool = torch.full((2, self.kv_heads, rows, self.head_dim), torch.nan, dtype=torch.float64)
        for start, length, size in zip(starts, self.prefixes, self.sizes, strict=True):
            pool[:, :, start : start + (length if size else 0)] = 0
        for own, length in zip(blocks, self.suffixes, strict=False):
            pool[:, :, suffix_rows(own.tolist(), length, self.block)] = 0
            own[-(-length // self.block) :] = ANYTHING
        blocks[self.branches :] = -ANYTHING
        q = torch.randn(batch, self.heads, self.head_dim, dtype=torch.float64)
        q[self.branches :] = torch.nan
        empty = [size == 0 for size in self.sizes]
        offsets = [sum(self.sizes[:group]) for group in range(len(self.sizes) + 1)]
        keys, values = pool + torch.randn_like(pool)
        return {
            "q": q,
            "keys": keys,
            "values": values,
            "group_offsets": int32(offsets),
            "prefix_starts": int32([ANYTHING if no else start for start, no in zip(starts, empty, strict=True)]),
            "prefix_lengths": int32([ANYTHING if no else n for n, no in zip(self.prefixes, empty, strict=True)]),
            "suffix_blocks": blocks.int(),
            "suffix_lengths": int32([*self.suffixes, *[ANYTHING] * self.padding]),
            "block": self.block,
            "scale": self.scale,
        }


@dataclass(frozen=True)
class RopeCase:
    """New tokens of a decode step, of width Dh, of which `rotary` columns are turned."""

    tokens: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    rotary: int = 16
    interleaved: bool = False
    norms: bool = False

    def draw(self) -> Arguments:
        """float64; the rows are in no order, and the rest of the cache is NaN."""
        width = self.heads + 2 * self.kv_heads
        q, k, v = torch.randn(self.tokens, width, self.head_dim, dtype=torch.float64).split(
            (self.heads, self.kv_heads, self.kv_heads), 1
        )
        angles = 100 * torch.rand(self.tokens, self.rotary // 2, dtype=torch.float64)
        angles = angles.repeat_interleave(2, 1) if self.interleaved else torch.cat([angles, angles], 1)
        cache = torch.full((2, self.kv_heads, 3 * self.tokens + 1, self.head_dim), torch.nan, dtype=torch.float64)
        arguments = {"q": q, "k": k, "v": v, "cos": angles.cos(), "sin": angles.sin(), "keys": cache[0]}
        arguments |= {"values": cache[1], "rows": torch.randperm(3 * self.tokens + 1)[: self.tokens]}
        if self.norms:
            arguments |= {name: 1 + torch.rand(self.head_dim, dtype=torch.float64) for name in ("q_norm", "k_norm")}
        return arguments | {"interleaved": self.interleaved, "eps": 1e-3}


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def suffix_rows(blocks: list[int], length: int, block: int) -> list[int]:
    return [blocks[t // block] * block + t % block for t in range(length)]


def cast(arguments: Arguments, dtype: torch.dtype, device: str = "cpu") -> Arguments:
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def one_by_one(
    q, keys, values, group_offsets, prefix_starts, prefix_lengths, suffix_blocks, suffix_lengths, block, scale
) -> Tensor:
    """Each branch over its own keys, gathered, heads repeated; zeros for padding."""
    out = torch.zeros_like(q)
    repeat = q.shape[1] // len(keys)
    for group, (first, last) in enumerate(pairwise(group_offsets.tolist())):
        for b in range(first, last):
            start = int(prefix_starts[group])
            rows = [*range(start, start + int(prefix_lengths[group]))]
            rows += suffix_rows(suffix_blocks[b].tolist(), int(suffix_lengths[b]), block)
            k, v = (pool[:, rows].repeat_interleave(repeat, 0) for pool in (keys, values))  # [H, n, Dh]
            scores = (q[b, :, None] @ k.mT) * (q.shape[2] ** -0.5 if scale is None else scale)
            out[b] = (torch.softmax(scores, -1) @ v)[:, 0]
    return out


def check_budget(run: Callable[..., Tensor], arguments: Arguments, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """`run` errs against the oracle in float64 at most twice as much as the oracle in `dtype`; return its output."""
    arguments = cast(arguments, dtype)
    out = run(**cast(arguments, dtype, device)).cpu()
    assert out.dtype == dtype
    exact = one_by_one(**cast(arguments, torch.float64))
    assert_within_budget(["out"], [out], [one_by_one(**arguments)], [exact])
    return out
