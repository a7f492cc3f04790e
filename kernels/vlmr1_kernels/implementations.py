"""The table of implementations, and when each refuses. The order within an op is the preference of `auto`.

`Request.shape` is (N, D, V) for the linear ops, (N, B) for grpo_loss, (B, G) for group_advantages,
(H, Hkv, L, Dh) for shared_prefix_attention and (B, P, H, Hkv, Dh) for shared_prefix_decode.
"""

from collections.abc import Callable, Mapping

import torch

from vlmr1_kernels.registry import Implementation, Request

_FLASH_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _never(request: Request) -> None:
    return None


def _cpu_attention(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"runs on cpu, the tensors are on {request.device.type}"
    if request.dtype not in _FLASH_DTYPES:
        return f"serves float32, bfloat16 and float16, not {request.dtype}"
    return None


def _rows(op: str, **others: tuple[str, Callable[[Request], str | None]]) -> tuple[str, Mapping[str, Implementation]]:
    entries = {name: Implementation(op, name, target, refusal) for name, (target, refusal) in others.items()}
    entries["reference"] = Implementation(op, "reference", f"vlmr1_kernels.reference.{op}:{op}", _never)
    return op, entries


TABLE: Mapping[str, Mapping[str, Implementation]] = dict(
    [
        _rows("linear_logprob"),
        _rows("group_advantages"),
        _rows("grpo_loss"),
        _rows("linear_grpo_loss"),
        _rows(
            "shared_prefix_attention",
            cpu=("vlmr1_kernels.cpu.shared_prefix_attention:shared_prefix_attention", _cpu_attention),
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
