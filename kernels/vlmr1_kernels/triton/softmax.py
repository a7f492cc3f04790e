"""Passes over the vocabulary: statistics of a row of logits [V], and its gradient. One program per row.

The logits are read as the GEMM wrote them; bias, softcap and temperature are applied while reading. Pass 1 runs forward
and pass 2 backward, since the end of the row is still in the L2 cache. Each prefetches its next block.
"""

import ctypes
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels.triton.launch import architecture

BLOCK = 4096
# With 64 registers two programs share an SM: one loads while the other reduces, with 32 KiB in flight. Where ptxas
# spills with so few, four programs of a quarter of the size share an SM: sm_120, and sm_100 with a softcap.
LAUNCH = {"BLOCK": BLOCK, "num_warps": 16, "maxnreg": 64}
LAUNCH_MORE_REGISTERS = {"BLOCK": BLOCK // 4, "num_warps": 4, "maxnreg": 128}
LAUNCH_ELSEWHERE = {"BLOCK": BLOCK, "num_warps": 16}  # ROCm knows no maxnreg
ROW_ALIGNMENT = 16  # elements: rows of any V start aligned and are padded to whole vectors

# Stands for logits of minus infinity: probability 0, without infinity times zero in the entropy.
LOWEST: tl.constexpr = tl.constexpr(-1e30)


def launch_options(device: torch.device, softcap: float | None) -> dict[str, int]:
    """Return block and options of a launch."""
    arch = architecture(device)
    if arch == 0:
        return LAUNCH_ELSEWHERE
    return LAUNCH_MORE_REGISTERS if arch // 10 == 12 or (arch // 10 == 10 and softcap) else LAUNCH


def head_terms(bias: Tensor | None, temperature: float, softcap: float | None) -> tuple[Any, ...]:
    """Return (bias, inverse, rest, outer) of z = outer * tanh(x / softcap), or x / temperature; None skips a step.

    The reciprocal of the divisor is inverse + rest: one rounded factor would bias all logits alike.
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
def transform_logits(x, offsets, limit, head):
    """Return (z, slope): logits after bias, softcap and temperature, and dz / dx times the temperature."""
    bias, inverse, rest, outer = head
    slope = 1.0
    if bias is not None:
        x += tl.load(bias + offsets, mask=offsets < limit, other=0).to(tl.float32)
    x = tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)  # infinity times `rest` is not a number
    if inverse is not None:
        x = tl.fma(x, inverse, x * rest)
    if outer is not None:
        x = tanh(x)
        slope = 1 - x * x
        x = x * outer
    return x, slope


@triton.jit
def accumulate(z, peak, total, moment, ENTROPY: tl.constexpr):
    """Update of each lane: peak = max z, total = sum exp(z - peak), moment = sum (z - peak) exp(z - peak).

    The new peak is either the old one or z, so one exponential suffices.
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
    """Return (peak, log_sum, entropy, logp): max z, log(sum(exp(z - peak))), -sum(p log p), log p of the target."""
    lanes = tl.arange(0, BLOCK)
    full = vocabulary // BLOCK * BLOCK
    # Load before the reductions, whose barriers order it before the gradient overwrites the row.
    hit = tl.load(row + target)
    x = tl.load(row + lanes, mask=lanes < stride)
    total = tl.zeros((BLOCK,), tl.float32)
    peak, moment = total + LOWEST, total
    for start in range(0, full, BLOCK):
        offsets = start + lanes
        ahead = tl.load(row + offsets + BLOCK, mask=offsets + BLOCK < stride)
        z, _ = transform_logits(x, offsets, full, head)
        peak, total, moment = accumulate(z, peak, total, moment, ENTROPY)
        x = ahead
    z, _ = transform_logits(x, full + lanes, vocabulary, head)
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
    z, _ = transform_logits(hit, target, vocabulary, head)
    return top, log_sum, entropy, (z - top) - log_sum


@triton.jit
def gradient_block(x, offsets, limit, target, peak, log_sum, entropy, d_logp, d_entropy, head):
    """Return d_logp * d log p[target] / dx + d_entropy * d entropy / dx, times the temperature."""
    z, slope = transform_logits(x, offsets, limit, head)
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
    """Write the gradient of the row's logits in the dtype of `out`; d_entropy is None without entropy.

    `out` may be the row itself if both are float32, since the lane that loads an element also stores it. A narrower
    `out` must be other memory: its elements would overwrite logits that other lanes have not read.
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
