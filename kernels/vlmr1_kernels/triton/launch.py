"""What every launch needs."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Run the kernel as that many programs. A grid holds 2^31 - 1 of them in its first dimension alone."""
    kernel[(programs,)](*args, **constants)


def readable(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Contiguous and aligned to 16 bytes: Triton compiles a variant for each set of aligned pointers."""

    def made(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.contiguous()
        return tensor.clone() if tensor.data_ptr() % 16 else tensor

    return tuple(made(tensor) for tensor in tensors)


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the device of its first argument as the current one: there Triton launches."""

    @wraps(function)
    def run(tensor: Tensor, *others: Any, **options: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return function(tensor, *others, **options)

    return run
