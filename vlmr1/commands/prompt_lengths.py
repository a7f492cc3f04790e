"""Tokens of a prompt, counted as the trainer does, without the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vlmr1.data.images import open_image
from vlmr1.errors import SettingError
from vlmr1.types import Sample

Measure = Callable[[Sample], int]  # tokens of a sample's prompt


def processor_of(model: str, limits: dict[str, int | None]) -> tuple[Any, str]:
    """Return a model's processor with these limits on images, and the model type."""
    from transformers import AutoConfig

    from vlmr1.data.image_limits import limit_images
    from vlmr1.models.processor import load_processor
    from vlmr1.tiny import model_path

    try:
        name = model_path(model)
        processor, model_type = load_processor(name), AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        raise SettingError(f"--model: {error}") from error
    limit_images(processor, model_type, **limits)
    return processor, model_type


def prompt_measure(processor: Any) -> Measure:
    """Return a function that counts the tokens of a prompt as the trainer does, image tokens included."""

    def measure(sample: Sample) -> int:
        text = processor.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
        images = [open_image(image, sample.source) for image in sample.images]
        start = processor.tokenizer.bos_token
        special = not (start and text.startswith(start))
        inputs = processor(text=[text], images=images or None, add_special_tokens=special, return_tensors="pt")
        return inputs["input_ids"].shape[1]

    return measure
