"""Parameters of which each rank holds a part: two of them mixed, read whole, and written.

Every rank has to call each function, for the same parameters in the same order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import distribute_tensor

from vlmr1.distributed.sharded import Sharding


@torch.no_grad()
def mix(parameter: Any, other: Any, alpha: float, sharding: Sharding | None) -> None:
    """parameter = (1 - alpha) parameter + alpha other, in place; both are spread over the ranks alike.

    ZeRO-3 has further copies of some partitions (gathered, quantized, on a disk): it is told of the change by its own
    way to make one."""
    if sharding == "zero3":
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([other]), GatheredParameters([parameter], modifier_rank=0):
            _mix(parameter, other.detach(), alpha)
    elif sharding == "fsdp2":
        _mix(parameter.to_local(), other.detach().to_local(), alpha)
    else:
        _mix(parameter, other.detach(), alpha)


def _mix(parameter: Tensor, other: Tensor, alpha: float) -> None:
    parameter.mul_(1 - alpha).add_(other.to(parameter.device), alpha=alpha)


@torch.no_grad()
def read(parameter: Any, sharding: Sharding | None, *, keep: bool) -> Tensor | None:
    """The whole tensor: one process's own, else a copy in host memory on ranks that `keep` it, None on the others."""
    if sharding is None:
        return parameter.detach() if keep else None
    if sharding == "fsdp2":
        whole = parameter.detach().full_tensor()
        return whole.cpu() if keep else None
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True) if keep else None


@torch.no_grad()
def write(parameter: Any, whole: Tensor, sharding: Sharding | None) -> None:
    """Take the values of a whole tensor, which each rank has."""
    if sharding == "zero3":
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(whole)
    elif sharding == "fsdp2":
        own = whole.to(parameter.device)
        parameter.copy_(distribute_tensor(own, parameter.device_mesh, parameter.placements, src_data_rank=None))
    else:
        parameter.copy_(whole)
