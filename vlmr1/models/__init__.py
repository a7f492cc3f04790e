"""One adapter a model family; `adapter_of` chooses it, `load_model` and `load_processor` read a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from vlmr1.errors import SettingError
from vlmr1.models.processor import load_processor
from vlmr1.models.qwen2_5_vl import QwenVLAdapter

ADAPTERS = {model_type: QwenVLAdapter for model_type in QwenVLAdapter.model_types}

__all__ = ["ADAPTERS", "QwenVLAdapter", "adapter_of", "load_model", "load_processor"]


def adapter_of(model: Any) -> QwenVLAdapter:
    """The adapter of a model's family; SettingError where there is none."""
    model_type = model.config.model_type
    if model_type not in ADAPTERS:
        raise SettingError(f"model_name_or_path: no adapter for {model_type}; there is one for {', '.join(ADAPTERS)}")
    return ADAPTERS[model_type]()


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    revision: str = "main",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Read a local directory or hub id of a supported family."""
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if config.model_type not in ADAPTERS:
            raise SettingError(
                f"model_name_or_path: no adapter for {config.model_type}; there is one for {', '.join(ADAPTERS)}"
            )
        return AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=dtype, attn_implementation=attn_implementation, **options
        )
    except OSError as error:
        raise SettingError(f"model_name_or_path: {error}") from error
