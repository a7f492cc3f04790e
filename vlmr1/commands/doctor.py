"""`vlmr1 doctor`: what this machine has, and which implementation each op would pick on it."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from vlmr1.telemetry.phases import gpu_info
from vlmr1_kernels import registry
from vlmr1_kernels.native import library

REQUIRED = ("torch", "transformers", "accelerate", "safetensors", "pillow", "numpy")
OPTIONAL = ("torchvision", "triton", "flash-attn", "liger-kernel", "bitsandbytes", "peft", "deepspeed", "vllm", "trl")
OPTIONAL += ("nvidia-ml-py",)
ABSENT = "not installed"


def run(options: argparse.Namespace, rest: list[str]) -> None:
    print(doctor())


def doctor() -> str:
    """Return the report as text: machine, packages, and the selected implementation of every op."""
    sections = {
        "Machine": _machine(),
        "Packages": [(name, installed(name)) for name in REQUIRED],
        "Optional packages": [*((name, installed(name)) for name in OPTIONAL), ("native library", _native())],
    }
    lines = []
    for title, rows in sections.items():
        lines += [title, *(f"  {name:<16}{value}" for name, value in rows), ""]
    return "\n".join([*lines, *_ops()])


def installed(distribution: str) -> str:
    """Return the version of an installed distribution, or "not installed", without importing it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ABSENT


def _machine() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [("python", platform.python_version()), ("system", f"{platform.platform()}, {cores} cores")]
    if not torch.version.cuda:
        rows.append(("CUDA", "torch is built without it"))
    elif torch.cuda.is_available():
        rows.append(("CUDA", f"{torch.version.cuda}, {torch.cuda.device_count()} visible to torch"))
    else:
        rows.append(("CUDA", f"{torch.version.cuda}, but torch finds no usable GPU"))
    return rows + _gpus()


def _gpus() -> list[tuple[str, str]]:
    gpus = gpu_info()
    if gpus is None:
        if installed("nvidia-ml-py") == ABSENT:
            return [("GPU", "unknown: nvidia-ml-py is not installed")]
        return [("GPU", "none: NVML finds no working NVIDIA driver")]
    rows = [
        (f"GPU {gpu.index}", f"{gpu.name}, {gpu.used_mib:,.0f} of {gpu.total_mib:,.0f} MiB used, driver {gpu.driver}")
        for gpu in gpus
    ]
    return rows or [("GPU", "none: the NVIDIA driver runs, but has no GPU")]


def _native() -> str:
    return library.unavailable_reason() or f"{library.PATH.name}, instruction set {library.backend()}"


def _ops() -> list[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lines = [f"Ops (on {device} in {str(dtype).removeprefix('torch.')})"]
    for explanation in registry.explain_all(device, dtype):
        lines.append(f"  {explanation.op:<26}{explanation.chosen}")
        lines += [f"    not {name}: {why}" for name, why in explanation.others.items()]
    return lines
