"""`vlmr1 merge`: a checkpoint that holds an adapter becomes an ordinary model directory."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from vlmr1.errors import SettingError
from vlmr1.lifecycle.checkpoint import is_adapter, publish
from vlmr1.models import load_model, load_processor
from vlmr1.models.lora import base_name, read_adapter
from vlmr1.models.processor import save_processor
from vlmr1.models.quantization import quantization_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="a directory that does not exist")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    merge(options.checkpoint, options.output, dtype=options.dtype)


def merge(checkpoint: Path, output: Path, *, dtype: str = "float32") -> None:
    """Write safetensors, configuration and processor of the model with the adapter in its weights, in `dtype`. A base
    that was trained in 4 bits is dequantized first: what is written is the model that was trained, unquantized.

    SettingError: no adapter is in `checkpoint`, or `output` exists."""
    if not is_adapter(checkpoint):
        raise SettingError(f"--checkpoint: {checkpoint} holds no adapter")
    if output.exists():
        raise SettingError(f"--output: {output} exists")
    name, revision = base_name(checkpoint)
    compute_dtype = quantization_of(checkpoint)
    base = load_model(name, dtype=torch.float32, revision=revision, compute_dtype=compute_dtype)
    if compute_dtype is not None:
        base.dequantize(torch.float32)
        print(f"{name} was trained in 4 bits: its layers are written as they were then, in {dtype}", flush=True)
    model = read_adapter(base, checkpoint).merge_and_unload(safe_merge=True).to(DTYPES[dtype])
    staging = output.parent / f".staging-{output.name}"
    shutil.rmtree(staging, ignore_errors=True)  # of a merge that was killed
    staging.mkdir(parents=True)
    model.save_pretrained(staging)
    save_processor(load_processor(checkpoint), staging)
    publish(staging, output)
    print(f"{output}: {checkpoint} merged into {name}, {dtype}", flush=True)
