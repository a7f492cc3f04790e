"""Attention of one decode step in two launches: over chunks of keys, then a merge by log-sum-exp.

A program of the first launch has a tile of query rows and a chunk of keys. For a prefix the tile holds the rows of a
group (branches x query heads per key head), for a suffix those of one branch. The number of chunks depends on shapes
and bounds alone, so that a CUDA graph can capture the launch; their length is read on the device.
"""

from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels import custom_decode_ops
from vlmr1_kernels.inputs import DecodeTables
from vlmr1_kernels.triton.launch import launch, on_tensor_device, processors, shared_memory

# Programs per SM that hide latency; chunks below LEAST_CHUNK keys cost more to merge than they save.
PROGRAMS, LEAST_CHUNK, MOST_CHUNKS = 2, 128, 64
SMALLEST_TILE = 16  # query rows: the minimum of tl.dot
NUM_WARPS, MOST_STAGES = 4, 4  # three tiles of keys and values in flight, fewer where shared memory is short
MERGE = {"BLOCK": 16, "num_warps": 4}  # partial results at once


@triton.jit
def chunk_bounds(chunk, chunks, length, LEAST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first key of a chunk and its exclusive end; later chunks may be empty."""
    size = tl.maximum(tl.cdiv(tl.cdiv(length, chunks), BLOCK_N) * BLOCK_N, LEAST)
    return chunk * size, tl.minimum((chunk + 1) * size, length)


@triton.jit
def attend(
    q, keys, values, key_stride, value_stride, row, seen, table, start, begin, end, factor, partial, lse, slot, slots,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the attention of query rows `row` (where `seen`) over keys begin..end - 1, and its base-2 log-sum-exp.

    Key t is cache row start + t, or with a block table row table[t // PAGE] * PAGE + t % PAGE.
    """
    column = tl.arange(0, BLOCK_D)
    queries = tl.load(
        q + row[:, None] * HEAD_DIM + column[None, :], mask=seen[:, None] & (column < HEAD_DIM)[None, :], other=0.0
    )  # [M, D]
    peak = tl.full(row.shape, float("-inf"), tl.float32)
    total = tl.zeros(row.shape, tl.float32)
    out = tl.zeros(queries.shape, tl.float32)
    for first in range(begin, end, BLOCK_N):
        token = first + tl.arange(0, BLOCK_N)
        named = token < end
        place = start + token
        if table is not None:
            place = tl.load(table + token // PAGE, mask=named, other=0) * PAGE + token % PAGE
        place = place.to(tl.int64)
        k = tl.load(
            keys + place[None, :] * key_stride + column[:, None],
            mask=named[None, :] & (column < HEAD_DIM)[:, None],
            other=0.0,
        )  # [D, N]
        scores = tl.dot(queries, k, input_precision="ieee") * factor
        scores = tl.where(named[None, :], scores, float("-inf"))  # [M, N]
        higher = tl.maximum(peak, tl.max(scores, 1))
        decay = tl.exp2(peak - higher)
        weights = tl.exp2(scores - higher[:, None])
        v = tl.load(
            values + place[:, None] * value_stride + column[None, :],
            mask=named[:, None] & (column < HEAD_DIM)[None, :],
            other=0.0,
        )  # [N, D]
        total = total * decay + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * decay[:, None], input_precision="ieee")
        peak = higher
    place = row * slots + slot
    if begin < end:
        tl.store(lse + place, peak + tl.log2(total), mask=seen)
        tl.store(
            partial + place[:, None] * HEAD_DIM + column[None, :],
            out / total[:, None],
            mask=seen[:, None] & (column < HEAD_DIM)[None, :],
        )
    else:
        tl.store(lse + place, peak, mask=seen)


@triton.jit(do_not_specialize=["groups", "kv_heads", "tiles", "prefix_chunks", "suffix_chunks", "table_stride"])
def partials_kernel(
    q, keys, values, key_strides, value_strides, prefixes, suffixes, partial, lse,
    groups, kv_heads, tiles, prefix_chunks, suffix_chunks, table_stride, factor,
    HEAD_DIM: tl.constexpr, FOLDED: tl.constexpr, PAGE: tl.constexpr, LEAST: tl.constexpr,
    TILE: tl.constexpr, SUFFIX_TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write partial [B, H, chunks, Dh] and lse [B, H, chunks]: chunks of the prefix, then of the suffix."""
    offsets, starts, lengths = prefixes
    blocks, suffix_lengths = suffixes
    program = tl.program_id(0)
    prefix_programs = groups * kv_heads * prefix_chunks * tiles
    slots = prefix_chunks + suffix_chunks
    if program < prefix_programs:
        # Tiles that read the same keys are adjacent, for the L2 cache.
        tile, chunk = program % tiles, program // tiles % prefix_chunks
        others = program // (tiles * prefix_chunks)
        head, group = (others % kv_heads).to(tl.int64), others // kv_heads
        first = tl.load(offsets + group)
        count = (tl.load(offsets + group + 1) - first) * FOLDED
        if tile * TILE < count:
            member = tile * TILE + tl.arange(0, TILE)
            row = ((first + member // FOLDED) * kv_heads + head) * FOLDED + member % FOLDED
            begin, end = chunk_bounds(chunk, prefix_chunks, tl.load(lengths + group), LEAST, BLOCK_N)
            attend(
                q, keys + head * key_strides[0], values + head * value_strides[0], key_strides[1], value_strides[1],
                row, member < count, None, tl.load(starts + group), begin, end, factor, partial, lse, chunk, slots,
                HEAD_DIM, PAGE, BLOCK_D, BLOCK_N,
            )  # fmt: skip
    else:
        program -= prefix_programs
        chunk = program % suffix_chunks
        others = program // suffix_chunks
        head, branch = (others % kv_heads).to(tl.int64), (others // kv_heads).to(tl.int64)
        if branch < tl.load(offsets + groups):
            member = tl.arange(0, SUFFIX_TILE)
            row = (branch * kv_heads + head) * FOLDED + member
            begin, end = chunk_bounds(chunk, suffix_chunks, tl.load(suffix_lengths + branch), LEAST, BLOCK_N)
            attend(
                q, keys + head * key_strides[0], values + head * value_strides[0], key_strides[1], value_strides[1],
                row, member < FOLDED, blocks + branch * table_stride, 0, begin, end, factor, partial, lse,
                prefix_chunks + chunk, slots, HEAD_DIM, PAGE, BLOCK_D, BLOCK_N,
            )  # fmt: skip


@triton.jit(do_not_specialize=["groups", "heads", "slots"])
def merge_kernel(
    partial, lse, offsets, out, groups, heads, slots,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of a query row; padding rows become 0."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    merged = tl.zeros((BLOCK_D,), tl.float32)
    if row < tl.load(offsets + groups).to(tl.int64) * heads:
        peak = float("-inf")
        for first in range(0, slots, BLOCK):
            slot = first + tl.arange(0, BLOCK)
            own = tl.load(lse + row * slots + slot, mask=slot < slots, other=float("-inf"))
            peak = tl.maximum(peak, tl.max(own, 0))
        masses = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, slots, BLOCK):
            slot = first + tl.arange(0, BLOCK)
            own = tl.load(lse + row * slots + slot, mask=slot < slots, other=float("-inf"))
            weight = tl.exp2(own - peak)
            parts = tl.load(
                partial + (row * slots + slot)[:, None] * HEAD_DIM + column[None, :],
                mask=(own != float("-inf"))[:, None] & (column < HEAD_DIM)[None, :],  # empty chunks wrote nothing
                other=0.0,
            )
            merged += tl.sum(weight[:, None] * parts, 0)
            masses += weight
        merged /= tl.sum(masses, 0)
    tl.store(out + row * HEAD_DIM + column, merged.to(out.dtype.element_ty), mask=column < HEAD_DIM)


@on_tensor_device
def _forward(
    q: Tensor, keys: Tensor, values: Tensor, tables: DecodeTables, *,
    block: int, max_group: int, max_prefix: int, scale: float,
) -> Tensor:  # fmt: skip
    batch, heads, head_dim = q.shape
    out = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    groups, kv_heads = len(tables.prefix_starts), len(keys)
    folded = heads // kv_heads
    offsets, starts, lengths, blocks, suffix_lengths = (table.contiguous() for table in tables)
    block_d = max(16, triton.next_power_of_2(head_dim))
    largest_tile, block_n = _tile_sizes(q.dtype, block_d)
    tile = min(_power_of_2(min(max_group, batch) * folded), largest_tile)
    tiles = triton.cdiv(min(max_group, batch) * folded, tile)
    wanted = PROGRAMS * processors(q.device)
    prefix_chunks = _chunks(max_prefix, groups * kv_heads * tiles, wanted)
    suffix_chunks = _chunks(blocks.shape[1] * block, batch * kv_heads, wanted)
    slots = prefix_chunks + suffix_chunks
    partial = torch.empty(batch, heads, slots, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch, heads, slots, dtype=torch.float32, device=q.device)
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
    launch(
        partials_kernel, groups * kv_heads * prefix_chunks * tiles + batch * kv_heads * suffix_chunks,
        q.contiguous(), keys, values, keys.stride()[:2], values.stride()[:2],
        (offsets, starts, lengths), (blocks, suffix_lengths),
        partial, lse, groups, kv_heads, tiles, prefix_chunks, suffix_chunks, blocks.shape[1], scale * log2(e),
        FOLDED=folded, PAGE=block, LEAST=LEAST_CHUNK, TILE=tile, SUFFIX_TILE=_power_of_2(folded), BLOCK_N=block_n,
        **sizes, num_warps=NUM_WARPS,
        num_stages=_stages(tile, block_n, block_d, q.dtype.itemsize, shared_memory(q.device)),
    )  # fmt: skip
    launch(merge_kernel, batch * heads, partial, lse, offsets, out, groups, heads, slots, **sizes, **MERGE)
    return out


def _power_of_2(rows: int) -> int:
    return max(triton.next_power_of_2(rows), SMALLEST_TILE)


def _chunks(length: int, others: int, wanted: int) -> int:
    """Return how many chunks to split keys into, given the numbers of other and of wanted programs of the launch."""
    return min(triton.cdiv(length, LEAST_CHUNK), triton.cdiv(wanted, others), MOST_CHUNKS)


def _stages(tile: int, block_n: int, block_d: int, size: int, limit: int) -> int:
    """Return the number of stages of the loop over keys, which fit into `limit` bytes of shared memory together with
    the queries and the weights of a tile. `size`: bytes of an element."""
    fixed, each = tile * (block_d + block_n) * size + 1024, 2 * block_n * block_d * size
    return max(2, min(MOST_STAGES, 1 + (limit - fixed) // each))


def _tile_sizes(dtype: torch.dtype, block_d: int) -> tuple[int, int]:
    """Return the largest number of query rows of a tile, and its number of keys.

    float32 does not use tensor cores, and its operands stay in registers."""
    if dtype == torch.float32:
        return 16, 16
    return (64 if block_d <= 128 else 32), 32


shared_prefix_decode = custom_decode_ops.shared_prefix_decode("triton", _forward)
