"""Weights of a checkpoint: an ordinary model directory or an adapter, read by the names that its files have."""

from __future__ import annotations

from typing import Any

from vlmr1.lifecycle.checkpoint import is_adapter
from vlmr1.models import load_model
from vlmr1.models.lora import base_of, restore_adapter
from vlmr1.models.processor import save_processor


def load_weights(model: Any, checkpoint: str, *, adapter: bool) -> None:
    """Load every weight, or raise: for some families the names in the files are not the module's."""
    if adapter:
        restore_adapter(model, checkpoint)
    else:
        model.load_state_dict(load_model(checkpoint, dtype=model.dtype).state_dict())


def complete_model_directory(folder: str, model: Any, processor: Any) -> None:
    """Add the processor, and to an adapter the configuration of its base model: the processor's class, and how the
    weights were quantized, are read from it."""
    save_processor(processor, folder)
    if is_adapter(folder):
        base_of(model).config.save_pretrained(folder)
