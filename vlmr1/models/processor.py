"""The processor of a checkpoint: the stock one where torchvision is, an image-only one elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available


class ImageOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """`Qwen2_5_VLProcessor` without its video processor, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None):
        self.image_token = "<|image_pad|>"
        self.video_token = "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def load_processor(model: str | Path, **kwargs: Any) -> ProcessorMixin:
    """Processor of a local directory or hub id; `kwargs` (revision, trust_remote_code) reach every part."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(model, **kwargs)
    tokenizer = AutoTokenizer.from_pretrained(model, **kwargs)
    image_processor = AutoImageProcessor.from_pretrained(model, **kwargs)
    return ImageOnlyQwenProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)


def save_processor(processor: Any, folder: str | Path) -> None:
    """Write what `load_processor` reads, with and without torchvision."""
    if isinstance(processor, ImageOnlyQwenProcessor):
        processor.tokenizer.save_pretrained(folder)
        processor.image_processor.save_pretrained(folder)
    else:
        processor.save_pretrained(folder)
