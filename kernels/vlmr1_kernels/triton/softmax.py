"""The passes over the vocabulary. One program reads one row of logits [V] as the GEMM left it: bias, softcap
and temperature are applied while reading.

Pass 1 goes forward and pass 2 backward: the end of the row is what the L2 cache still holds. Each loads its
next block before it works on the present one.
"""

import ctypes
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

# 64 registers let two programs share an SM: one streams while the other reduces, and 32 KiB are on their way.
LAUNCH = {"BLOCK": 4096, "num_warps": 16, "maxnreg": 64}
ROW_ALIGNMENT = 16  # elements: rows of any V start aligned, and whole vectors fit into their padding

# Logits of minus infinity are read as this: probability 0, and no infinity times zero in the entropy.
LOWEST: tl.constexpr = tl.constexpr(-1e30)


def head_terms(bias: Tensor | None, temperature: float, softcap: float | None) -> tuple[Any, ...]:
    """(bias, inverse, rest, outer): z = outer * tanh(x / softcap), or x / temperature; None for a step left out.

    The reciprocal of the divisor comes in two parts: one rounded factor would be an error shared by all logits.
    """
    divisor = temperature if softcap is None else softcap
    high = _single(1 / divisor)
    inverse, rest = (None, None) if divisor == 1 else (high, _single((1 - high * divisor) / divisor))
    return bias, inverse, rest, softcap and _single(softcap / temperature)


def _single(value: float) -> float:
    return ctypes.c_float(value).value


@triton.jit
def tanh(x):
    size = tl.abs(x)
    square = x * x
    series = tl.fma(square, -0.005895155572460614, 0.02079596962954844)  # minimax up to 0.6, error 3e-9
    series = tl.fma(square, series, -0.05378382970970417)
    series = tl.fma(square, series, 0.1333192412042635)
    series = tl.fma(square, series, -0.3333329800189525)
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.6, tl.fma(x * square, series, x), tl.where(x < 0, -far, far))


@triton.jit
def finish(x, offsets, limit, head):
    """(z, slope): the logits as the softmax takes them, and dz / dx times the temperature."""
    bias, inverse, rest, outer = head
    slope = 1.0
    if bias is not None:
        x += tl.load(bias + offsets, mask=offsets < limit, other=0).to(tl.float32)
    if inverse is not None:
        x = tl.fma(x, inverse, x * rest)
    if outer is None:
        x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    else:
        x = tanh(x)
        slope = 1 - x * x
        x = x * outer
    return x, slope


@triton.jit
def accumulate(z, peak, total, moment, ENTROPY: tl.constexpr):
    """Lane by lane: peak = max z, total = sum exp(z - peak), moment = sum (z - peak) exp(z - peak).

    Either the old peak or the new element is the new peak, so one exponential serves both.
    """
    gap = z - peak
    rises = gap > 0
    decay = tl.exp(-tl.abs(gap))
    if ENTROPY:
        moment = tl.fma(decay, tl.where(rises, moment - gap * total, gap), tl.where(rises, 0.0, moment))
    total = tl.fma(decay, tl.where(rises, total, 1.0), tl.where(rises, 1.0, total))
    return tl.maximum(peak, z), total, moment


@triton.jit
def row_statistics(row, target, stride, vocabulary, head, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """(peak, log_sum, entropy, logp): max z, log(sum(exp(z - peak))), -sum(p log p) and log p of the target."""
    lanes = tl.arange(0, BLOCK)
    full = vocabulary // BLOCK * BLOCK
    # Read before the reductions: their barriers keep it ahead of a gradient that overwrites the row.
    hit = tl.load(row + target)
    x = tl.load(row + lanes, mask=lanes < stride)
    total = tl.zeros((BLOCK,), tl.float32)
    peak, moment = total + LOWEST, total
    for start in range(0, full, BLOCK):
        offsets = start + lanes
        ahead = tl.load(row + offsets + BLOCK, mask=offsets + BLOCK < stride)
        z, _ = finish(x, offsets, full, head)
        peak, total, moment = accumulate(z, peak, total, moment, ENTROPY)
        x = ahead
    z, _ = finish(x, full + lanes, vocabulary, head)
    z = tl.where(full + lanes < vocabulary, z, LOWEST)
    peak, total, moment = accumulate(z, peak, total, moment, ENTROPY)

    top = tl.max(peak, 0)
    gap = peak - top
    decay = tl.exp(gap)
    mass = tl.sum(total * decay, 0)
    log_sum = tl.log(mass)
    entropy = log_sum
    if ENTROPY:
        entropy = log_sum - tl.fdiv(tl.sum(tl.fma(gap, total, moment) * decay, 0), mass)
    z, _ = finish(hit, target, vocabulary, head)
    return top, log_sum, entropy, (z - top) - log_sum


@triton.jit
def gradient_block(x, offsets, limit, target, peak, log_sum, entropy, d_logp, d_entropy, head):
    """d_logp * d log p[target] / dx + d_entropy * d entropy / dx, but for the temperature."""
    z, slope = finish(x, offsets, limit, head)
    log_p = (z - peak) - log_sum
    shift = d_logp
    if d_entropy is not None:
        shift = tl.fma(d_entropy, log_p + entropy, d_logp)
    gradient = -tl.exp(log_p) * shift
    return tl.where(offsets == target, gradient + d_logp, gradient) * slope


@triton.jit
def write_gradient(
    row, out, target, stride, vocabulary, peak, log_sum, entropy, d_logp, d_entropy, head, BLOCK: tl.constexpr
):
    """out = the gradient of the row's logits, in the dtype of `out`; d_entropy is None without entropy.

    `out` may be the row itself if both are float32: then the lane that loads an element also stores it. A
    narrower `out` needs memory of its own, other lanes have yet to read what its elements would overwrite.
    """
    lanes = tl.arange(0, BLOCK)
    full = vocabulary // BLOCK * BLOCK
    offsets = full + lanes
    x = tl.load(row + offsets, mask=offsets < stride)
    ahead = tl.load(row + offsets - BLOCK, mask=offsets >= BLOCK)
    value = gradient_block(x, offsets, vocabulary, target, peak, log_sum, entropy, d_logp, d_entropy, head)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=offsets < stride)
    for done in range(0, full, BLOCK):
        x = ahead
        offsets = full - BLOCK - done + lanes
        ahead = tl.load(row + offsets - BLOCK, mask=offsets >= BLOCK)
        value = gradient_block(x, offsets, full, target, peak, log_sum, entropy, d_logp, d_entropy, head)
        tl.store(out + offsets, value.to(out.dtype.element_ty))
