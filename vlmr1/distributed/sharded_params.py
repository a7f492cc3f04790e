"""Parameters that are sharded over the ranks: interpolate, gather and scatter.

Every rank must call each function, for the same parameters in the same order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

from vlmr1.distributed.sharded import Sharding


@torch.no_grad()
def lerp_(parameter: Any, other: Any, alpha: float, sharding: Sharding | None) -> None:
    """Set parameter = (1 - alpha) * parameter + alpha * other in place; both are sharded alike.

    ZeRO-3 may hold further copies of a partition (gathered, quantized, on disk), which `GatheredParameters` updates."""
    if sharding == "zero3":
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([other]), GatheredParameters([parameter], modifier_rank=0):
            _lerp(parameter, other.detach(), alpha)
    elif sharding == "fsdp2":
        _lerp(parameter.to_local(), other.detach().to_local(), alpha)
    else:
        _lerp(parameter, other.detach(), alpha)


def _lerp(parameter: Tensor, other: Tensor, alpha: float) -> None:
    parameter.mul_(1 - alpha).add_(other.to(parameter.device), alpha=alpha)


@torch.no_grad()
def gather_full(parameter: Any, sharding: Sharding | None, *, keep: bool) -> Tensor | None:
    """Return the full tensor on ranks that `keep` it, else None: a CPU copy if sharded, else the parameter itself."""
    if sharding is None:
        return parameter.detach() if keep else None
    if sharding == "fsdp2":
        full = parameter.detach().full_tensor()
        return full.cpu() if keep else None
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True) if keep else None


@torch.no_grad()
def scatter_full(parameter: Any, full: Tensor, sharding: Sharding | None) -> None:
    """Copy a full tensor, which every rank has, to the sharded parameter."""
    if sharding == "zero3":
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(full)
    elif sharding == "fsdp2":
        full = full.to(parameter.device)
        parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))
    else:
        parameter.copy_(full)
