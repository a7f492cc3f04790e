"""The table of implementations and what each supports. The order within an op is the preference of `auto`."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

_HALF = (torch.bfloat16, torch.float16)


class Request(NamedTuple):
    """Facts that `auto` decides from: device, dtype, shape, and options that not every implementation supports.

    `shape` is (N, D, V) for the linear ops, (N, B) for grpo_loss, (B, G) for group_advantages, (H, Hkv, L, Dh) for
    shared_prefix_attention and varlen_attention, (B, P, H, Hkv, Dh) for shared_prefix_decode, (S, V) for sample_tokens,
    and (S, H, Hkv, Dh) for rope_kv_write.
    """

    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]
    options: frozenset[str] = frozenset()


Reason = Callable[[Request], str | None]


class _Remembered:
    """Decorator that keeps results for good. functools.cache does not do: torch.compile traces through it."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.known: dict[Any, Any] = {}

    def __call__(self, *key: Any) -> Any:
        if key not in self.known:
            self.known[key] = self.function(*key)
        return self.known[key]


def _none(request: Request) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op.

    Fields:
        target: "module:function", imported at the first use.
        unsupported_reason: why a request is not supported, or None.
        explicit_only: why `auto` does not choose it although it is supported, or None.
    """

    op: str
    name: str
    target: str
    unsupported_reason: Reason = _none
    explicit_only: Reason = _none


def _place_reason(request: Request, place: str) -> str | None:
    kind = request.device.type
    return None if kind == place else f"runs on {place}, the tensors are on {kind}"


def _cpu_attention(request: Request) -> str | None:
    return (
        _place_reason(request, "cpu")
        or _dtype_reason(request)
        or _options_reason(request, "torch's flash kernel for CPUs")
    )


def _flash(request: Request, widest: int = 256) -> str | None:
    if reason := _place_reason(request, "cuda"):
        return reason
    if request.dtype not in _HALF:
        return f"supports bfloat16 and float16, not {request.dtype}"
    head_dim = request.shape[-1]
    if head_dim % 8 or head_dim > widest:
        return f"supports head dimensions that are multiples of 8 up to {widest}, not {head_dim}"
    if reason := _options_reason(request, "flash"):
        return reason
    if torch.version.hip is not None:
        return "supports NVIDIA GPUs only"
    return None if _capability(request.device) >= (8, 0) else "needs compute capability 8.0"


def _flash3(request: Request) -> str | None:
    return _flash(request) or _flash_package(request, 3, 9)


def _flash4(request: Request) -> str | None:
    return _flash(request, widest=128) or _flash_package(request, 4, 10)


def _flash_package(request: Request, version: int, major: int) -> str | None:
    there, _ = _capability(request.device)
    return _missing(version) or (None if there == major else f"used on compute capability {major}, not {there}")


@_Remembered
def _missing(version: int) -> str | None:
    from vlmr1_kernels.flash.packages import missing

    return missing(version)


def _merged(reason: Reason) -> Reason:
    """Return the reason with that of the Triton kernel that merges two calls."""
    return lambda request: reason(request) or _no_triton()


@_Remembered
def _no_triton() -> str | None:
    return "triton is not installed" if find_spec("triton") is None else None


@_Remembered
def _capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability; 8.0 where no GPU is there to ask."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)


def _flex(request: Request) -> str | None:
    if reason := _place_reason(request, "cuda"):
        return f"{reason}; FlexAttention has no backward there"
    if reason := _no_triton():
        return reason
    if request.shape[-1] < 16:
        return f"supports head dimensions of at least 16, not {request.shape[-1]}"
    return _dtype_reason(request)


def _options_reason(request: Request, name: str) -> str | None:
    return f"{name} has no {', no '.join(sorted(request.options))}" if request.options else None


def _dtype_reason(request: Request) -> str | None:
    if request.dtype not in (torch.float32, *_HALF):
        return f"supports float32, bfloat16 and float16, not {request.dtype}"
    return None


def _triton(request: Request) -> str | None:
    if reason := _no_triton() or _dtype_reason(request):
        return reason
    if request.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on cuda, or anywhere with TRITON_INTERPRET=1; the tensors are on {request.device.type}"
    return None


def _triton_decode(request: Request) -> str | None:
    head_dim = request.shape[-1]
    return _triton(request) or (f"supports head dimensions up to 256, not {head_dim}" if head_dim > 256 else None)


def _triton_sampling(request: Request) -> str | None:
    return _triton(request) or _options_reason(request, "triton")


def _interpreted(request: Request) -> str | None:
    return None if request.device.type == "cuda" else "Triton's interpreter is for tests"


def _native(request: Request) -> str | None:
    if reason := _place_reason(request, "cpu") or _dtype_reason(request):
        return reason
    from vlmr1_kernels.native.library import unavailable_reason  # imports torch._dynamo

    return unavailable_reason()


def _op(op: str, **reasons: Reason) -> dict[str, Implementation]:
    """Return the implementations of an op by name, `reference` last."""

    def target(name: str) -> str:
        return f"vlmr1_kernels.flash.{op}:{name}" if "flash" in name else f"vlmr1_kernels.{name}.{op}:{op}"

    return {
        name: Implementation(op, name, target(name), reason, _interpreted if name == "triton" else _none)
        for name, reason in (*reasons.items(), ("reference", _none))
    }


_FLASH: Mapping[str, Reason] = {"flash3": _flash3, "flash4": _flash4, "flash": _flash}


TABLE: Mapping[str, Mapping[str, Implementation]] = {
    "linear_logprob": _op("linear_logprob", native=_native, triton=_triton),
    "group_advantages": _op("group_advantages", native=_native, triton=_triton),
    "grpo_loss": _op("grpo_loss", native=_native, triton=_triton),
    "linear_grpo_loss": _op("linear_grpo_loss", native=_native, triton=_triton),
    "shared_prefix_attention": _op(
        "shared_prefix_attention",
        cpu=_cpu_attention,
        **{name: _merged(reason) for name, reason in _FLASH.items()},
        flex=_flex,
    ),
    "varlen_attention": _op("varlen_attention", cpu=_cpu_attention, **_FLASH, batched=_none),
    "shared_prefix_decode": _op("shared_prefix_decode", triton=_triton_decode),
    "sample_tokens": _op("sample_tokens", triton=_triton_sampling),
    "rope_kv_write": _op("rope_kv_write", triton=_triton),
}

EXAMPLE_SHAPES: Mapping[str, tuple[int, ...]] = {
    "linear_logprob": (8192, 2048, 151936),
    "group_advantages": (64, 8),
    "grpo_loss": (8192, 64),
    "linear_grpo_loss": (8192, 2048, 151936),
    "shared_prefix_attention": (16, 2, 4096, 128),
    "varlen_attention": (16, 16, 4096, 80),
    "shared_prefix_decode": (64, 8, 16, 2, 128),
    "sample_tokens": (64, 151936),
    "rope_kv_write": (64, 16, 2, 128),
}
