"""Registers, memory and vector widths of the compiled kernels: python -m tests.helpers.resources

Needs no GPU: the ops run on meta tensors of training size, and launches are compiled but not run.
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vlmr1_kernels.inputs import HeadInputs, LossInputs
from vlmr1_kernels.settings import GRPOSettings
from vlmr1_kernels.triton import group_advantages, grpo_loss, head, linear_grpo_loss, linear_logprob


@dataclass(frozen=True)
class Launch:
    """One launch: kernel, grid and compiled code."""

    name: str
    grid: tuple[int, ...]
    compiled: Any


@dataclass(frozen=True)
class Resources:
    """Resources of one compiled kernel: bytes per program, and instructions in its code by width in bits."""

    case: str
    name: str
    capability: int
    warps: int
    registers: int
    stack: int
    local: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    conversions: int  # of layouts, which move elements between lanes


class _Driver:
    """Stands for the active driver during compilation."""

    def __init__(self, capability: int) -> None:
        self.capability, self.target = capability, GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[list[Launch]]:
    """Context manager that compiles launches for a compute capability, lists them and runs none."""
    launches: list[Launch] = []
    run: Callable[..., Any] = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel.__name__, grid, run(kernel, *args, grid=grid, warmup=True, **options)))

    with (
        patch.object(triton.runtime.driver, "_active", _Driver(capability)),
        patch.object(JITFunction, "run", compile_only),
        patch.object(head, "gemm_operand", lambda matrix: matrix),
    ):
        yield launches


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def loss_step(
    settings: GRPOSettings,
    *,
    rows: int = 8192,
    dim: int = 2048,
    vocabulary: int = 151_936,
    sequences: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    off_policy: bool = True,
    needs: tuple[bool, bool, bool] = (True, True, False),
    bias: bool = False,
    softcap: float | None = None,
    rewards: bool = False,
) -> None:
    """Run the forward of linear_grpo_loss on meta tensors."""
    ids = meta(rows, dtype=torch.int64)
    old, ref, sampling = (meta(rows) if given else None for given in (off_policy, settings.beta, settings.tis_cap))
    scores = (None, meta(sequences), 8) if rewards else (meta(sequences), None, 8)
    inputs = LossInputs(ids, *scores, old, ref, sampling, None)
    hidden, weight = meta(rows, dim, dtype=dtype), meta(vocabulary, dim, dtype=dtype)
    bias_values = meta(vocabulary, dtype=dtype) if bias else None
    head = HeadInputs(hidden, weight, bias_values, ids, settings.temperature, softcap)
    linear_grpo_loss._forward(head, None, inputs, 1024, 1.0, needs, settings)


def logprob_step(*, rows: int = 8192, dim: int = 2048, vocabulary: int = 151_936, entropy: bool = True) -> None:
    """Run forward and backward of linear_logprob on meta tensors."""
    hidden, weight = meta(rows, dim, dtype=torch.bfloat16), meta(vocabulary, dim, dtype=torch.bfloat16)
    targets = meta(rows, dtype=torch.int64)
    head = HeadInputs(hidden, weight, None, targets, 1.0, None)
    logp, token_entropy, lse = linear_logprob._forward(head, entropy, 1024)
    linear_logprob._backward(head, lse, token_entropy, logp, token_entropy, (True, True, False), 1024)


EVERYTHING = GRPOSettings(beta=0.1, tis_cap=2.0, delta=4.0, entropy_coef=0.01, temperature=0.9)
CASES: dict[str, Callable[[], Any]] = {
    "on-policy": lambda: loss_step(GRPOSettings(), off_policy=False),
    "everything": lambda: loss_step(EVERYTHING, bias=True, softcap=30.0, rewards=True),
    "float32": lambda: loss_step(GRPOSettings(beta=0.1), dtype=torch.float32),
    "cispo": lambda: loss_step(GRPOSettings(loss_type="cispo", epsilon_high=5.0, temperature=0.9)),
    "gspo": lambda: loss_step(GRPOSettings(loss_type="gspo", beta=0.1, entropy_coef=0.01)),
    "gspo, frozen head": lambda: loss_step(GRPOSettings(loss_type="gspo"), needs=(True, False, False)),
    "log-probs": lambda: logprob_step(entropy=False),
    "log-probs and entropy": logprob_step,
    "advantages": lambda: [group_advantages.group_advantages(meta(64), 8, scale=s) for s in ("group", "batch", "none")],
    "given log-probs": lambda: grpo_loss._forward(
        meta(8192),
        LossInputs(meta(8192, dtype=torch.int32), meta(64), None, 1, meta(8192), None, None, meta()),
        GRPOSettings(),
    ),
}


def measure(capability: int) -> list[Resources]:
    """Return the resources of all kernels; a kernel of several cases is listed with the first."""
    found: dict[str, Resources] = {}
    for case, step in CASES.items():
        with compiling(capability) as launches:
            step()
        for launch in launches:
            if launch.compiled.hash not in found:
                found[launch.compiled.hash] = _resources(case, launch, capability)
    return list(found.values())


def _resources(case: str, launch: Launch, capability: int) -> Resources:
    compiled = launch.compiled
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)

    def used(name: str) -> int:
        return int(re.search(rf"\b{name}:(\d+)", usage).group(1))  # pyright: ignore[reportOptionalMemberAccess]

    return Resources(
        case=case,
        name=launch.name,
        capability=capability,
        warps=compiled.metadata.num_warps,
        registers=used("REG"),
        stack=used("STACK"),
        local=used("LOCAL") + len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        loads=_widths("LDG", code),
        stores=_widths("STG", code),
        conversions=compiled.asm["ttgir"].count("ttg.convert_layout"),
    )


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *args], capture_output=True, text=True, check=True).stdout


def _widths(instruction: str, code: str) -> dict[int, int]:
    """Return the count of an instruction by width in bits."""
    counts: dict[int, int] = {}
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)", code):
        width = re.search(r"\.[US]?(8|16|64|128)\b", modifiers)
        bits = int(width.group(1)) if width else 32
        counts[bits] = counts.get(bits, 0) + 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the resources of the compiled kernels as JSON.")
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90])
    options = parser.parse_args()
    print(json.dumps([asdict(resources) for capability in options.capability for resources in measure(capability)]))


if __name__ == "__main__":
    main()
