"""Group-relative advantages."""

import torch
from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.native import library

_SCALES = ("none", "group", "batch")


def _forward(rewards: Tensor, num_generations: int, scale: str) -> Tensor:
    (wide,) = library.to_double(rewards)
    out = torch.empty(rewards.shape, dtype=torch.float64)
    library.library().vlmr1_group_advantages(
        library.pointer(wide), rewards.numel(), num_generations, _SCALES.index(scale), out.data_ptr()
    )
    return out.to(rewards.dtype)


group_advantages = custom_ops.group_advantages("native", _forward)
