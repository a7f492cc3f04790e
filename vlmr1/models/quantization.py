"""4-bit weights of the decoder's linear layers: nf4 with double quantization, by bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from vlmr1.errors import SettingError
from vlmr1.models.family import ModelFamily

BLOCK = 64  # weights with a common scale
CONFIG = "config.json"  # in a checkpoint; names the quantization


def four_bit(family: ModelFamily, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the quantization config. Head, embeddings, tower and projector are excluded: the loss reads the head."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[*family.vision_paths, family.head_path],
    )


def quantization_of(folder: str | Path) -> torch.dtype | None:
    """Return the compute dtype of the 4-bit base of an adapter, or None where it is not quantized."""
    path = Path(folder) / CONFIG
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    quantization = config.get("quantization_config")
    return getattr(torch, quantization["bnb_4bit_compute_dtype"]) if quantization else None


def check_layers(model: Any) -> None:
    """Work around two faults of bitsandbytes 0.50 on CPU.

    It dequantizes rows wrongly whose length is not a multiple of its blocks: SettingError. With AVX-512 and bfloat16 it
    repacks weights at the first forward without gradient, which rounds the scales. Rollouts would then sample from
    another model than the trained one, so repacking is disabled."""
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            if module.weight.device.type == "cpu" and module.in_features % BLOCK:
                raise SettingError(
                    f"load_in_4bit on CPU needs layers whose inputs are a multiple of {BLOCK}: {name} has "
                    f"{module.in_features}"
                )
            module.support_avx512bf16_for_cpu = False
