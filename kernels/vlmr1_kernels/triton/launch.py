"""Kernel launches."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from vlmr1_kernels.inputs import HeadInputs


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Launch a kernel on a grid of `programs`, in the first dimension: only that one holds 2^31 - 1."""
    kernel[(programs,)](*args, **constants)


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
