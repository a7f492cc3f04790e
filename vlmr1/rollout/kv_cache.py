"""Keys and values of a rollout: one pool of rows a layer, prompts in runs of rows, completions in blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmr1.models.attention import PackedAttention
from vlmr1_kernels import PrefixLayout, shared_prefix_decode

BLOCK = 16  # rows of a block


def blocks_of(rows: int) -> int:
    """Blocks that hold so many rows."""
    return -(-rows // BLOCK)


class Blocks:
    """Which blocks of a pool are free. Runs are taken from its start, single blocks from its end."""

    def __init__(self, count: int):
        self.free = bytearray(b"\1" * count)
        self.left = count
        self.most = 0  # used at a time

    def run(self, count: int) -> int | None:
        """The first of `count` adjacent blocks, or None where there are not so many."""
        start = self.free.find(b"\1" * count)
        if start < 0:
            return None
        self._take(start, count)
        return start

    def one(self) -> int | None:
        block = self.free.rfind(1)
        if block < 0:
            return None
        self._take(block, 1)
        return block

    def _take(self, start: int, count: int) -> None:
        self.free[start : start + count] = bytes(count)
        self.left -= count
        self.most = max(self.most, len(self.free) - self.left)

    def give(self, start: int, count: int = 1) -> None:
        self.free[start : start + count] = b"\1" * count
        self.left += count


class Pool:
    """Keys and values of all layers. The last block is scratch: what rows without a branch write goes there."""

    def __init__(self, config: Any, blocks: int, *, device: torch.device, dtype: torch.dtype):
        heads, head_dim = config.num_key_value_heads, head_dim_of(config)
        shape = (config.num_hidden_layers, 2, heads, (blocks + 1) * BLOCK, head_dim)
        # On CPU memory that nobody touches costs nothing. Rows that no length reaches are never read.
        self.rows = torch.empty(shape, device=device, dtype=dtype)
        self.blocks = Blocks(blocks)

    @property
    def scratch(self) -> int:
        """The block that belongs to no branch."""
        return len(self.blocks.free)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [Hkv, R, Dh]."""
        keys, values = self.rows[index]
        return keys, values


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def block_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers, keys and values."""
    width = config.num_key_value_heads * head_dim_of(config)
    return 2 * config.num_hidden_layers * width * dtype.itemsize * BLOCK


@dataclass
class PrefillAttention(PackedAttention):
    """Prompts in one packed row, whose keys and values go to runs of the pool."""

    pool: Pool = field(kw_only=True)
    starts: list[int] = field(kw_only=True)  # first row of each prompt

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        kept = self.pool.layer(layer)
        for start, offset, length in zip(
            self.starts, self.layout.prompt_offsets, self.layout.prompt_lengths, strict=True
        ):
            for rows, new in zip(kept, (k, v), strict=True):
                rows[:, start : start + length] = new[0, :, offset : offset + length]
        return super().attend(layer, q, k, v, scale)


def prefill_attention(pool: Pool, lengths: list[int], starts: list[int]) -> PrefillAttention:
    """For prompts of these lengths, kept from these rows on."""
    return PrefillAttention(PrefixLayout(tuple(lengths), ((),) * len(lengths)), pool=pool, starts=starts)


@dataclass
class DecodeAttention:
    """One token of each branch against its prompt and its own past; tensors as in `shared_prefix_decode`."""

    pool: Pool
    group_offsets: Tensor  # [P + 1]
    prefix_starts: Tensor  # [P]
    prefix_lengths: Tensor  # [P]
    suffix_blocks: Tensor  # [S, M]
    suffix_lengths: Tensor  # [S], the token that is decoded not counted
    max_group: int
    max_prefix: int
    now: tuple[Tensor, Tensor] | None = None  # pool rows of the tokens that are decoded; lengths with them

    def begin(self) -> None:
        """A step: where its keys and values go, the same in every layer."""
        lengths = self.suffix_lengths
        column = (lengths // BLOCK).clamp(max=self.suffix_blocks.shape[1] - 1)  # padding goes on for ever
        block = self.suffix_blocks.gather(1, column.long()[:, None])[:, 0]
        self.now = (block * BLOCK + lengths % BLOCK).long(), lengths + 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        assert self.now is not None
        rows, lengths = self.now
        keys, values = self.pool.layer(layer)
        keys.index_copy_(1, rows, k[:, :, 0].transpose(0, 1))
        values.index_copy_(1, rows, v[:, :, 0].transpose(0, 1))
        out = shared_prefix_decode(
            q[:, :, 0],
            keys,
            values,
            self.group_offsets,
            self.prefix_starts,
            self.prefix_lengths,
            self.suffix_blocks,
            lengths,
            block=BLOCK,
            max_group=self.max_group,
            max_prefix=self.max_prefix,
            scale=scale,
        )
        return out[:, :, None]

    def end(self) -> None:
        """The tokens of this step are past now."""
        assert self.now is not None
        self.suffix_lengths.copy_(self.now[1])
