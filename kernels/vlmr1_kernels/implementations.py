"""The table of implementations, and when each refuses. The order within an op is the preference of `auto`.

`Request.shape` is (N, D, V) for the linear ops, (N, B) for grpo_loss, (B, G) for group_advantages,
(H, Hkv, L, Dh) for shared_prefix_attention and varlen_attention, and (B, P, H, Hkv, Dh) for
shared_prefix_decode.
"""

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec

import torch

from vlmr1_kernels.registry import Implementation, Request

_DTYPES_32_AND_16 = (torch.float32, torch.bfloat16, torch.float16)


def _never(request: Request) -> None:
    return None


def _cpu_attention(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"runs on cpu, the tensors are on {request.device.type}"
    return _not_32_or_16(request) or _unserved(request, "torch's flash kernel for CPUs")


def _flash(request: Request) -> str | None:
    if request.device.type != "cuda":
        return f"runs on cuda, the tensors are on {request.device.type}"
    if request.dtype not in _DTYPES_32_AND_16[1:]:
        return f"serves bfloat16 and float16, not {request.dtype}"
    head_dim = request.shape[-1]
    if head_dim % 8 or head_dim > 256:
        return f"serves head dimensions that are multiples of 8 up to 256, not {head_dim}"
    return _unserved(request, "flash") or _device_problem(request.device)


def _device_problem(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "was written for NVIDIA GPUs"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    return None


def _flex(request: Request) -> str | None:
    if request.device.type != "cuda":
        return f"runs on cuda, the tensors are on {request.device.type}; elsewhere FlexAttention has no backward"
    if find_spec("triton") is None:
        return "triton is not installed"
    if request.shape[-1] < 16:
        return f"serves head dimensions of at least 16, not {request.shape[-1]}"
    return _not_32_or_16(request)


def _unserved(request: Request, name: str) -> str | None:
    return f"{name} has no {', no '.join(sorted(request.options))}" if request.options else None


def _not_32_or_16(request: Request) -> str | None:
    if request.dtype not in _DTYPES_32_AND_16:
        return f"serves float32, bfloat16 and float16, not {request.dtype}"
    return None


def _triton(request: Request) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if reason := _not_32_or_16(request):
        return reason
    if request.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on cuda, or anywhere with TRITON_INTERPRET=1; the tensors are on {request.device.type}"
    return None


def _triton_decode(request: Request) -> str | None:
    head_dim = request.shape[-1]
    return _triton(request) or (f"serves head dimensions up to 256, not {head_dim}" if head_dim > 256 else None)


def _interpreted(request: Request) -> str | None:
    return None if request.device.type == "cuda" else "Triton's interpreter is for tests"


def _native(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"runs on cpu, the tensors are on {request.device.type}"
    if reason := _not_32_or_16(request):
        return reason
    from vlmr1_kernels.native.library import problem

    return problem()


def _rows(op: str, *others: Implementation) -> tuple[str, Mapping[str, Implementation]]:
    return op, {row.name: row for row in (*others, _row(op, "reference", _never))}


def _row(op: str, name: str, refusal: Callable[[Request], str | None]) -> Implementation:
    return Implementation(op, name, f"vlmr1_kernels.{name}.{op}:{op}", refusal)


def _compiled(op: str) -> tuple[str, Mapping[str, Implementation]]:
    triton = Implementation(op, "triton", f"vlmr1_kernels.triton.{op}:{op}", _triton, _interpreted)
    return _rows(op, _row(op, "native", _native), triton)


_ATTENTION, _VARLEN, _DECODE = "shared_prefix_attention", "varlen_attention", "shared_prefix_decode"

TABLE: Mapping[str, Mapping[str, Implementation]] = dict(
    [
        _compiled("linear_logprob"),
        _compiled("group_advantages"),
        _compiled("grpo_loss"),
        _compiled("linear_grpo_loss"),
        _rows(
            _ATTENTION,
            _row(_ATTENTION, "cpu", _cpu_attention),
            _row(_ATTENTION, "flash", _flash),
            _row(_ATTENTION, "flex", _flex),
        ),
        _rows(_VARLEN, _row(_VARLEN, "flash", _flash), _row(_VARLEN, "batched", _never)),
        _rows(
            _DECODE,
            Implementation(
                _DECODE, "triton", f"vlmr1_kernels.triton.{_DECODE}:{_DECODE}", _triton_decode, _interpreted
            ),
        ),
    ]
)

EXAMPLE_SHAPES: Mapping[str, tuple[int, ...]] = {
    "linear_logprob": (8192, 2048, 151936),
    "group_advantages": (64, 8),
    "grpo_loss": (8192, 64),
    "linear_grpo_loss": (8192, 2048, 151936),
    "shared_prefix_attention": (16, 2, 4096, 128),
    "varlen_attention": (16, 16, 4096, 80),
    "shared_prefix_decode": (64, 8, 16, 2, 128),
}
