"""`vlmr1 merge`: merge an adapter checkpoint into an ordinary model directory."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from vlmr1.errors import SettingError
from vlmr1.lifecycle.checkpoint import is_adapter, publish
from vlmr1.models.adapters import base_name
from vlmr1.models.quantization import quantization_of
from vlmr1.training.weights import write_merged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path, help="a checkpoint, or any directory of an adapter")
    parser.add_argument("--output", required=True, type=Path, help="a directory that does not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    merge(options.checkpoint, options.output, dtype=options.dtype)


def merge(checkpoint: Path, output: Path, *, dtype: str = "float32") -> None:
    """Write the merged model's weights in `dtype`, its configuration and processor; a 4-bit base is dequantized first.

    SettingError where `checkpoint` holds no adapter, or `output` exists."""
    if not is_adapter(checkpoint):
        raise SettingError(f"--checkpoint: {checkpoint} holds no adapter")
    if output.exists():
        raise SettingError(f"--output: {output} exists")
    name = base_name(checkpoint)[0]
    if quantization_of(checkpoint) is not None:
        print(f"{name} was trained in 4 bits: its layers are written as they were then, in {dtype}", flush=True)
    staging = output.parent / f".staging-{output.name}"
    shutil.rmtree(staging, ignore_errors=True)  # left by a killed merge
    write_merged(checkpoint, staging, DTYPES[dtype])
    publish(staging, output)
    print(f"{output}: {checkpoint} merged into {name}, {dtype}", flush=True)
