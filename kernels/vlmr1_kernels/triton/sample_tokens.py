"""Sampling in two launches: statistics of blocks of the vocabulary, then the choice of a block and of a token in it.

With min_p a launch between them sums each block anew, over what exceeds the threshold of its row. Blocks and their
elements are summed in float64 where they are compared with a draw, and an element of weight 0 is never chosen.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels import custom_decode_ops
from vlmr1_kernels.inputs import SamplingOptions
from vlmr1_kernels.triton.launch import launch, on_tensor_device
from vlmr1_kernels.triton.softmax import LOWEST

BLOCK = 2048
SLOTS = 256  # blocks of a row that are read at once
IDS = 64  # suppressed ids that are compared at once with the bounds of a block
ALIGNMENT = 16  # elements
STATISTICS_WARPS, CHOICE_WARPS = 4, 8


@triton.jit
def load_block(row_logits, start, vocabulary, BLOCK: tl.constexpr):
    """Return logits start..start + BLOCK - 1 in float32, -inf beyond the vocabulary."""
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= vocabulary:  # without a mask the load has whole vectors
        x = tl.load(row_logits + offsets)
    else:
        x = tl.load(row_logits + offsets, mask=offsets < vocabulary, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def tempered(x, inside, temperature):
    """Return x / temperature, at least LOWEST `inside` the vocabulary and -inf beyond."""
    if temperature is not None:
        x = tl.div_rn(x, temperature)
    return tl.where(inside, tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL), float("-inf"))


@triton.jit
def suppressed_in(suppressed, count, start, BLOCK: tl.constexpr, IDS: tl.constexpr):
    """Return how many of the suppressed ids are in the block."""
    found = tl.zeros((IDS,), tl.int32)
    for first in range(0, count, IDS):
        place = first + tl.arange(0, IDS)
        ids = tl.load(suppressed + place, mask=place < count, other=-1)
        found += ((ids >= start) & (ids < start + BLOCK)).to(tl.int32)
    return tl.sum(found, 0)


@triton.jit
def allowed_block(
    x, row, start, vocabulary, factors, rules, seen_stride, count, BLOCK: tl.constexpr, IDS: tl.constexpr
):
    """Return logits after penalty and temperature, -inf at suppressed ids."""
    temperature, penalty = factors
    seen, suppressed = rules
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < vocabulary
    if seen is not None:
        penalized = tl.where(x > 0, tl.div_rn(x, penalty), x * penalty)
        x = tl.where(tl.load(seen + row * seen_stride + offsets, mask=inside, other=0) != 0, penalized, x)
    z = tempered(x, inside, temperature)
    if suppressed is not None:
        found = suppressed_in(suppressed, count, start, BLOCK, IDS)
        if found != 0:
            for i in range(count):
                z = tl.where(offsets == tl.load(suppressed + i), float("-inf"), z)
    return z


@triton.jit
def peak_and_sum(z):
    """Return max z, at least LOWEST, and sum exp(z - max); NaN sums where a z is NaN."""
    peak = tl.maximum(tl.max(z, 0), LOWEST)
    return peak, tl.sum(tl.exp(z - peak), 0)


@triton.jit
def block_weights(peaks, sums, slot, blocks, peak):
    """Return sum exp(z - peak) of blocks, float64."""
    own = tl.load(peaks + slot, mask=slot < blocks, other=LOWEST)
    return tl.load(sums + slot, mask=slot < blocks, other=0.0).to(tl.float64) * tl.exp(own - peak).to(tl.float64)


@triton.jit
def row_peak(peaks, blocks, SLOTS: tl.constexpr):
    found = tl.full((SLOTS,), LOWEST, tl.float32)
    for first in range(0, blocks, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        found = tl.maximum(found, tl.load(peaks + slot, mask=slot < blocks, other=LOWEST))
    return tl.max(found, 0)


@triton.jit
def sum_before(peaks, sums, end, blocks, peak, SLOTS: tl.constexpr):
    """Return sum exp(z - peak) of the blocks before `end`, float64."""
    total = tl.zeros((SLOTS,), tl.float64)
    for first in range(0, blocks, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        total += tl.where(slot < end, block_weights(peaks, sums, slot, blocks, peak), 0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["stride", "seen_stride", "count", "vocabulary", "blocks", "size"])
def block_statistics_kernel(
    logits, stride, factors, rules, seen_stride, count, statistics, vocabulary, blocks, size,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Write statistics [4, S, blocks]: peak and sum of a block of all tokens, then of those that may be drawn."""
    place = tl.program_id(0)
    row, start = (place // blocks).to(tl.int64), place % blocks * BLOCK
    seen, suppressed = rules
    x = load_block(logits + row * stride * ALIGNED, start, vocabulary, BLOCK)
    full_peak, full_sum = peak_and_sum(tempered(x, start + tl.arange(0, BLOCK) < vocabulary, factors[0]))
    peak, total = full_peak, full_sum
    differs = 1
    if seen is None:
        differs = 0
        if suppressed is not None:
            differs = suppressed_in(suppressed, count, start, BLOCK, IDS)
    if differs != 0:
        z = allowed_block(x, row, start, vocabulary, factors, rules, seen_stride, count, BLOCK, IDS)
        peak, total = peak_and_sum(z)
    tl.store(statistics + place, full_peak)
    tl.store(statistics + size + place, full_sum)
    tl.store(statistics + 2 * size + place, peak)
    tl.store(statistics + 3 * size + place, total)


@triton.jit(do_not_specialize=["stride", "seen_stride", "count", "vocabulary", "blocks", "size"])
def threshold_kernel(
    logits, stride, factors, rules, seen_stride, count, statistics, vocabulary, blocks, size, least,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Sum each block anew, over the tokens whose z is at least the largest of the row plus `least`."""
    place = tl.program_id(0)
    row, start = (place // blocks).to(tl.int64), place % blocks * BLOCK
    x = load_block(logits + row * stride * ALIGNED, start, vocabulary, BLOCK)
    z = allowed_block(x, row, start, vocabulary, factors, rules, seen_stride, count, BLOCK, IDS)
    peaks = statistics + 2 * size
    kept = z - row_peak(peaks + row * blocks, blocks, SLOTS) >= least
    weight = tl.where(kept, tl.exp(z - tl.load(peaks + place)), 0.0)
    tl.store(statistics + 3 * size + place, tl.sum(weight, 0))


@triton.jit(do_not_specialize=["stride", "seen_stride", "count", "vocabulary", "blocks", "size"])
def choice_kernel(
    logits, stride, factors, rules, seen_stride, count, draws, statistics, tokens, logp, sampling_logp,
    vocabulary, blocks, size, least,
    GREEDY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, IDS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Write token and log-probs of a row."""
    row = tl.program_id(0).to(tl.int64)
    full_peaks = statistics + row * blocks
    peaks = full_peaks + 2 * size
    sums = peaks + size
    peak = row_peak(peaks, blocks, SLOTS)
    total = sum_before(peaks, sums, blocks, blocks, peak, SLOTS)
    target = total * tl.load(draws + row)

    # The first block whose cumulative sum exceeds the target. Rounding may leave none: then the last of weight above 0.
    left, chosen, last = target, blocks, 0
    for first in range(0, blocks, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        weight = block_weights(peaks, sums, slot, blocks, peak)
        if GREEDY:
            hit = tl.load(peaks + slot, mask=slot < blocks, other=float("-inf")) == peak
        else:
            hit = (tl.cumsum(weight, 0) > left) & (weight > 0)
        chosen = tl.minimum(chosen, tl.min(tl.where(hit, slot, blocks), 0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, slot, 0), 0))
        left -= tl.sum(weight, 0)
    chosen = tl.where(chosen < blocks, chosen, last)

    # The same within the block, relative to its own peak.
    start, lanes = chosen * BLOCK, tl.arange(0, BLOCK)
    own = tl.load(peaks + chosen)
    x = load_block(logits + row * stride * ALIGNED, start, vocabulary, BLOCK)
    z = allowed_block(x, row, start, vocabulary, factors, rules, seen_stride, count, BLOCK, IDS)
    weight = tl.exp(z - own)
    if least is not None:
        weight = tl.where(z - peak >= least, weight, 0.0)
    if GREEDY:
        hit = z == own
    else:
        before = sum_before(peaks, sums, chosen, blocks, peak, SLOTS)
        left = (target - before) / tl.exp(own - peak).to(tl.float64)
        hit = (tl.cumsum(weight.to(tl.float64), 0) > left) & (weight > 0)
    lane = tl.min(tl.where(hit, lanes, BLOCK), 0)
    lane = tl.where(lane < BLOCK, lane, tl.max(tl.where(weight > 0, lanes, 0), 0))
    tl.store(tokens + row, (start + lane).to(tl.int64))

    full_peak = row_peak(full_peaks, blocks, SLOTS)
    full_total = sum_before(full_peaks, full_peaks + size, blocks, blocks, full_peak, SLOTS)
    full = tempered(x, start + lanes < vocabulary, factors[0])
    full_gap = tl.sum(tl.where(lanes == lane, full - full_peak, 0.0), 0)
    gap = tl.sum(tl.where(lanes == lane, z - peak, 0.0), 0)
    tl.store(logp + row, tl.cast(tl.cast(full_gap, tl.float64) - tl.log(full_total), tl.float32))
    tl.store(sampling_logp + row, tl.cast(tl.cast(gap, tl.float64) - tl.log(total), tl.float32))


@on_tensor_device
def _forward(
    logits: Tensor, draws: Tensor, suppressed_ids: Tensor | None, seen: Tensor | None, options: SamplingOptions
) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logp, sampling_logp = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    if rows == 0:
        return tokens, logp, sampling_logp
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    blocks = triton.cdiv(vocabulary, BLOCK)
    size = rows * blocks
    statistics = torch.empty(4, size, dtype=torch.float32, device=logits.device)
    aligned = ALIGNMENT if logits.stride(0) % ALIGNMENT == 0 else 1
    marked = None if seen is None or options.repetition_penalty == 1 else seen.contiguous().view(torch.uint8)
    ids = None if suppressed_ids is None or suppressed_ids.numel() == 0 else suppressed_ids.contiguous()
    common = (
        logits, logits.stride(0) // aligned,
        (None if options.temperature == 1 else options.temperature, options.repetition_penalty),
        (marked, ids), vocabulary, 0 if ids is None else ids.numel(),
    )  # fmt: skip
    sizes = {"ALIGNED": aligned, "BLOCK": BLOCK, "IDS": IDS}
    least = math.log(options.min_p) if options.min_p > 0 else None
    blocks_of = (vocabulary, blocks, size)
    launch(block_statistics_kernel, size, *common, statistics, *blocks_of, **sizes, num_warps=STATISTICS_WARPS)
    if least is not None:
        launch(
            threshold_kernel, size, *common, statistics, *blocks_of, least,
            **sizes, SLOTS=SLOTS, num_warps=CHOICE_WARPS,
        )  # fmt: skip
    launch(
        choice_kernel, rows, *common, draws.contiguous(), statistics, tokens, logp, sampling_logp, *blocks_of, least,
        GREEDY=options.greedy, **sizes, SLOTS=SLOTS, num_warps=CHOICE_WARPS,
    )  # fmt: skip
    return tokens, logp, sampling_logp


sample_tokens = custom_decode_ops.sample_tokens("triton", _forward)
