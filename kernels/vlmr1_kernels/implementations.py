"""The table of implementations, and when each refuses. The order within an op is the preference of `auto`.

`Request.shape` is (N, D, V) for the linear ops, (N, B) for grpo_loss, (B, G) for group_advantages,
(H, Hkv, L, Dh) for shared_prefix_attention and (B, P, H, Hkv, Dh) for shared_prefix_decode.
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec

import torch

from vlmr1_kernels.registry import Implementation, Request

_DTYPES_32_AND_16 = (torch.float32, torch.bfloat16, torch.float16)


def _never(request: Request) -> None:
    return None


def _cpu_attention(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"runs on cpu, the tensors are on {request.device.type}"
    if request.dtype not in _DTYPES_32_AND_16:
        return f"serves float32, bfloat16 and float16, not {request.dtype}"
    return None


def _triton(request: Request) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    if request.dtype not in _DTYPES_32_AND_16:
        return f"serves float32, bfloat16 and float16, not {request.dtype}"
    if request.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on cuda, or anywhere with TRITON_INTERPRET=1; the tensors are on {request.device.type}"
    return None


def _interpreted(request: Request) -> str | None:
    return None if request.device.type == "cuda" else "Triton's interpreter is for tests"


def _native(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"runs on cpu, the tensors are on {request.device.type}"
    if request.dtype not in _DTYPES_32_AND_16:
        return f"serves float32, bfloat16 and float16, not {request.dtype}"
    from vlmr1_kernels.native.library import problem

    return problem()


def _rows(op: str, *others: Implementation) -> tuple[str, Mapping[str, Implementation]]:
    reference = Implementation(op, "reference", f"vlmr1_kernels.reference.{op}:{op}", _never)
    return op, {row.name: row for row in (*others, reference)}


def _compiled(op: str) -> tuple[str, Mapping[str, Implementation]]:
    native, triton = (f"vlmr1_kernels.{name}.{op}:{op}" for name in ("native", "triton"))
    return _rows(
        op,
        Implementation(op, "native", native, _native),
        Implementation(op, "triton", triton, _triton, _interpreted),
    )


_ATTENTION = "shared_prefix_attention"

TABLE: Mapping[str, Mapping[str, Implementation]] = dict(
    [
        _compiled("linear_logprob"),
        _compiled("group_advantages"),
        _compiled("grpo_loss"),
        _compiled("linear_grpo_loss"),
        _rows(
            _ATTENTION,
            Implementation(_ATTENTION, "cpu", f"vlmr1_kernels.cpu.{_ATTENTION}:{_ATTENTION}", _cpu_attention),
        ),
        _rows("shared_prefix_decode"),
    ]
)

EXAMPLE_SHAPES: Mapping[str, tuple[int, ...]] = {
    "linear_logprob": (8192, 2048, 151936),
    "group_advantages": (64, 8),
    "grpo_loss": (8192, 64),
    "linear_grpo_loss": (8192, 2048, 151936),
    "shared_prefix_attention": (16, 2, 4096, 128),
    "shared_prefix_decode": (64, 8, 16, 2, 128),
}
