"""Group-relative advantages. The losses call the device functions on rewards."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels.triton.launch import contiguous_aligned, launch, on_tensor_device

STD_FLOOR: tl.constexpr = tl.constexpr(1e-4)
BLOCK = 256


@triton.jit
def centered(rewards, sequence, mask, generations):
    """Return (r - mean, unbiased std) of the group of each sequence.

    Computed relative to the first reward of the group, so that equal rewards cancel exactly."""
    group = sequence // generations * generations
    first = tl.load(rewards + group, mask=mask).to(tl.float32)
    total = tl.zeros_like(first)
    for i in range(generations):
        total += tl.load(rewards + group + i, mask=mask).to(tl.float32) - first
    mean = total / generations
    squares = tl.zeros_like(first)
    for i in range(generations):
        gap = tl.load(rewards + group + i, mask=mask).to(tl.float32) - first - mean
        squares += gap * gap
    own = tl.load(rewards + sequence, mask=mask).to(tl.float32) - first - mean
    return own, tl.sqrt_rn(squares / tl.maximum(generations - 1, 1))


@triton.jit(do_not_specialize=["count", "generations"])
def advantages_kernel(rewards, batch_std, out, count, generations, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = sequence < count
    value, std = centered(rewards, sequence, mask, generations)
    if SCALE == "batch":
        std = tl.load(batch_std)
    if SCALE != "none":
        value /= std + STD_FLOOR
    tl.store(out + sequence, value.to(out.dtype.element_ty), mask=mask)


@on_tensor_device
def group_advantages(rewards: Tensor, num_generations: int, *, scale: str) -> Tensor:
    (rewards,) = contiguous_aligned(rewards)
    out, count = torch.empty_like(rewards), rewards.numel()
    if count:
        batch_std = None
        if scale == "batch":
            spread = rewards.float() - rewards.float().mean()
            batch_std = spread.square().sum().div(max(count - 1, 1)).sqrt()
        grid, sizes = triton.cdiv(count, BLOCK), (count, num_generations)
        launch(advantages_kernel, grid, rewards, batch_std, out, *sizes, SCALE=scale, BLOCK=BLOCK)
    return out
