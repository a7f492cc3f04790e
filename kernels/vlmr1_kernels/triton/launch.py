"""Kernel launches, and the limits of the device that they depend on."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
import triton
from torch import Tensor

from vlmr1_kernels.inputs import HeadInputs


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Launch a kernel on a grid of `programs`, in the first dimension: only that one holds 2^31 - 1."""
    kernel[(programs,)](*args, **constants)


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> int:
    """Return ten times the compute capability of the current device; 0 for other makes and in the interpreter."""
    if device.type == "cpu":
        return 0
    target: Any = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


@lru_cache(maxsize=64)
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may take on the current device; many in the interpreter."""
    if device.type == "cpu":
        return 2**31
    active: Any = triton.runtime.driver.active
    return active.utils.get_device_properties(active.get_current_device())["max_shared_mem"]


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Return the number of SMs of the current device; that of an H100 in the interpreter."""
    if device.type == "cpu":
        return 132
    active: Any = triton.runtime.driver.active
    return active.utils.get_device_properties(active.get_current_device())["multiprocessor_count"]


def contiguous_aligned(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return contiguous tensors aligned to 16 bytes: Triton compiles a variant for each set of aligned pointers."""

    def aligned(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        return tensor.clone() if tensor.data_ptr() % 16 else tensor

    return tuple(aligned(tensor) for tensor in tensors)


def on_tensor_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that makes the device of the first argument, or of its first field, current: Triton launches there."""

    @wraps(function)
    def run(first: Tensor | HeadInputs, *others: Any, **options: Any) -> Any:
        with torch.cuda.device_of(first.hidden if isinstance(first, HeadInputs) else first):
            return function(first, *others, **options)

    return run
