"""KV cache of a rollout: each prompt is one run of adjacent blocks, each completion a list of single blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmr1.models.attention import PackedAttention
from vlmr1_kernels import PrefixLayout, shared_prefix_decode

BLOCK_SIZE = 16  # tokens


def num_blocks(tokens: int) -> int:
    """Return the number of blocks that hold `tokens` tokens."""
    return -(-tokens // BLOCK_SIZE)


def rounded_up(blocks: int) -> int:
    """Return the next size of a cache that is kept, at most 1/8 larger: later generations may need a bit more."""
    step = 1 << max(0, blocks.bit_length() - 4)
    return -(-blocks // step) * step


class BlockAllocator:
    """Free list of a KV cache. Runs are allocated from its start, single blocks from its end."""

    def __init__(self, count: int):
        self.count = count
        self.num_free = count
        self.peak_used = 0
        self._free = bytearray(b"\1" * count)  # 1: free

    def allocate_run(self, count: int) -> int | None:
        """Return the first of `count` adjacent blocks, or None if no run is long enough."""
        return self._allocate(self._free.find(b"\1" * count), count)

    def allocate(self) -> int | None:
        """Return a block, or None if none is free."""
        return self._allocate(self._free.rfind(1), 1)

    def _allocate(self, start: int, count: int) -> int | None:
        if start < 0:
            return None
        self._free[start : start + count] = bytes(count)
        self.num_free -= count
        self.peak_used = max(self.peak_used, self.count - self.num_free)
        return start

    def free(self, start: int, count: int = 1) -> None:
        """Free `count` adjacent blocks from `start` on."""
        self._free[start : start + count] = b"\1" * count
        self.num_free += count


class KVCache:
    """Keys and values of all layers. The last block is scratch space, which padding rows write to."""

    def __init__(self, config: Any, blocks: int, *, device: torch.device, dtype: torch.dtype):
        heads, head_dim = config.num_key_value_heads, head_dim_of(config)
        shape = (config.num_hidden_layers, 2, heads, (blocks + 1) * BLOCK_SIZE, head_dim)
        # Untouched CPU memory is never committed, and attention reads no row beyond a sequence's length.
        self.data = torch.empty(shape, device=device, dtype=dtype)
        self.allocator = BlockAllocator(blocks)

    def free_all(self) -> None:
        """Free all blocks, whose contents no sequence reads any more."""
        self.allocator = BlockAllocator(self.allocator.count)

    @property
    def scratch_block(self) -> int:
        """Index of the block that belongs to no sequence."""
        return self.allocator.count

    def read_blocks(self, blocks: Sequence[int]) -> Tensor:
        """Return a copy of these blocks in host memory, made layer by layer. Waits for the device."""
        index = torch.tensor(blocks, device=self.data.device)
        return torch.stack([layer.index_select(2, index).cpu() for layer in self._by_block()])

    def write_blocks(self, blocks: Sequence[int], stored: Tensor) -> None:
        """Fill these blocks from a copy that `read_blocks` returned."""
        index = torch.tensor(blocks, device=self.data.device)
        for layer, values in zip(self._by_block(), stored, strict=True):
            layer.index_copy_(2, index, values.to(layer.device))

    def _by_block(self) -> Tensor:
        """Return a view [layers, 2, Hkv, blocks, tokens, Dh]."""
        return self.data.unflatten(3, (-1, BLOCK_SIZE))

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [Hkv, R, Dh] of a layer."""
        keys, values = self.data[index]
        return keys, values


def head_dim_of(config: Any) -> int:
    """Return the head dimension of a decoder config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def block_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of one block: keys and values of all layers."""
    width = config.num_key_value_heads * head_dim_of(config)
    return 2 * config.num_hidden_layers * width * dtype.itemsize * BLOCK_SIZE


@dataclass
class PrefillAttention(PackedAttention):
    """Attention over prompts packed in one row; writes their keys and values to the cache."""

    cache: KVCache = field(kw_only=True)
    starts: list[int] = field(kw_only=True)  # first cache row of each prompt

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Write k, v [1, Hkv, L, Dh] to the cache; return the attention output [1, H, L, Dh]."""
        cached = self.cache.layer(layer)
        for start, offset, length in zip(
            self.starts, self.layout.prompt_offsets, self.layout.prompt_lengths, strict=True
        ):
            for rows, new in zip(cached, (k, v), strict=True):
                rows[:, start : start + length] = new[0, :, offset : offset + length]
        return super().attend(layer, q, k, v, scale)


def prefill_attention(cache: KVCache, lengths: list[int], starts: list[int]) -> PrefillAttention:
    """Return the attention of prompts with these lengths, written to the cache from rows `starts` on."""
    return PrefillAttention(PrefixLayout(tuple(lengths), ((),) * len(lengths)), cache=cache, starts=starts)


@dataclass
class DecodeAttention:
    """Attention of one new token per sequence over its prompt and suffix; tensors as in `shared_prefix_decode`."""

    cache: KVCache
    group_offsets: Tensor  # [P + 1] int32, like all tensors here
    prefix_starts: Tensor  # [P]
    prefix_lengths: Tensor  # [P]
    suffix_blocks: Tensor  # [S, M]
    suffix_lengths: Tensor  # [S] cached tokens, without the one being decoded
    max_group: int
    max_prefix: int
    step: tuple[Tensor, Tensor] | None = None  # cache rows of the new tokens [S]; suffix lengths with them [S]

    def begin_step(self) -> None:
        """Compute the cache rows of this step's keys and values, which are equal in every layer."""
        lengths = self.suffix_lengths
        column = (lengths // BLOCK_SIZE).clamp(max=self.suffix_blocks.shape[1] - 1)  # padding rows grow without bound
        block = self.suffix_blocks.gather(1, column.long()[:, None])[:, 0]
        self.step = (block * BLOCK_SIZE + lengths % BLOCK_SIZE).long(), lengths + 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Write k, v [S, Hkv, 1, Dh] to the cache; return the attention output [S, H, 1, Dh]."""
        assert self.step is not None
        rows = self.step[0]
        keys, values = self.cache.layer(layer)
        keys.index_copy_(1, rows, k[:, :, 0].transpose(0, 1))
        values.index_copy_(1, rows, v[:, :, 0].transpose(0, 1))
        return self.read(layer, q[:, :, 0], scale)[:, :, None]

    def read(self, layer: int, q: Tensor, scale: float | None) -> Tensor:
        """Return the attention output [S, H, Dh] of q [S, H, Dh], whose keys and values are in the cache already."""
        assert self.step is not None
        keys, values = self.cache.layer(layer)
        lengths = self.step[1]
        tables = self.group_offsets, self.prefix_starts, self.prefix_lengths, self.suffix_blocks, lengths
        sizes: dict[str, Any] = {"block": BLOCK_SIZE, "max_group": self.max_group, "max_prefix": self.max_prefix}
        return shared_prefix_decode(q, keys, values, *tables, **sizes, scale=scale)

    def end_step(self) -> None:
        """Count this step's tokens as cached."""
        assert self.step is not None
        self.suffix_lengths.copy_(self.step[1])
