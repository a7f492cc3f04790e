"""Weights of a checkpoint: an ordinary model directory or an adapter, read by the names that its files have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from vlmr1.errors import SettingError
from vlmr1.lifecycle.checkpoint import is_adapter
from vlmr1.models import load_model, load_processor
from vlmr1.models.adapters import base_name
from vlmr1.models.frozen import stored
from vlmr1.models.lora import adapts_head, base_of, read_adapter, restore_adapter
from vlmr1.models.processor import save_processor
from vlmr1.models.quantization import quantization_of, save_quantization


def load_weights(model: Any, checkpoint: str, *, adapter: bool) -> None:
    """Load every weight, or raise: for some families the names in the files are not the module's."""
    if adapter:
        restore_adapter(model, checkpoint)
    else:
        dtypes = [each.dtype for each in model.parameters() if each.is_floating_point()]
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)  # frozen weights may be narrower
        model.load_state_dict(load_model(checkpoint, dtype=widest).state_dict())


def as_read(model: Any, *, adapter: bool) -> AbstractContextManager[None]:
    """In this block frozen weights are what was read, in host memory, to be saved; an adapter is saved without them."""
    return nullcontext() if adapter else stored(model)


def complete_model_directory(folder: str, model: Any, processor: Any) -> None:
    """Add the processor, and to an adapter how its base model was quantized. A config.json beside an adapter would have
    transformers look for a whole model there."""
    save_processor(processor, folder)
    if is_adapter(folder):
        save_quantization(base_of(model), folder)


def write_merged(checkpoint: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the base model of an adapter with the adapter merged into its weights, and the processor."""
    name, revision = base_name(checkpoint)
    quantization = quantization_of(checkpoint)
    base: Any = load_model(name, dtype=torch.float32, revision=revision, quantization=quantization)
    if quantization is not None:
        base.dequantize(torch.float32)
    adapted = read_adapter(base, checkpoint)
    if base.config.tie_word_embeddings and adapts_head(base):
        raise SettingError(
            f"{checkpoint}: its adapter is at head or embeddings, which share weights: it cannot be merged"
        )
    adapted.merge_and_unload(safe_merge=True).to(dtype).save_pretrained(folder)
    save_processor(load_processor(checkpoint), folder)
