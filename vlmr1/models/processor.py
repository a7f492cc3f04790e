"""The processor of a checkpoint: the stock one where torchvision is, an image-only one elsewhere."""

from __future__ import annotations

from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, Idefics3Processor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

# SmolVLM's own class asks its video processor at every prompt; of images it makes what Idefics3's makes.
IN_PLACE_OF = {"SmolVLMProcessor": Idefics3Processor}


@cache
def image_only(stock: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A stock processor class without its video processor, which needs torchvision; its name is kept."""
    base: type[ProcessorMixin] = IN_PLACE_OF.get(stock.__name__, stock)
    parameters = dict(signature(base.__init__).parameters)
    left_out = {"video_processor": None} if parameters.pop("video_processor", None) else {}

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **left_out, **kwargs)

    def reduce(self: Any) -> tuple:
        return _empty, (stock,), self.__dict__

    # What the library loads and saves is named by the signature.
    kept = signature(base.__init__).replace(parameters=list(parameters.values()))
    init.__signature__ = kept  # type: ignore[attr-defined]
    return type(stock.__name__, (base,), {"__init__": init, "__reduce__": reduce})  # type: ignore[return-value]


def _empty(stock: type[ProcessorMixin]) -> ProcessorMixin:
    return object.__new__(image_only(stock))


def load_processor(model: str | Path, **kwargs: Any) -> ProcessorMixin:
    """Processor of a local directory or hub id; `kwargs` (revision, trust_remote_code) reach every part."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(model, **kwargs)
    image_class = image_only(PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(model, **kwargs))])
    tokenizer = AutoTokenizer.from_pretrained(model, **kwargs)
    image_processor = AutoImageProcessor.from_pretrained(model, **kwargs)
    written, _ = image_class.get_processor_dict(model, **kwargs)
    known = signature(image_class).parameters.keys() - set(image_class.get_attributes())
    settings = {"chat_template": tokenizer.chat_template}
    settings |= {name: value for name, value in written.items() if name in known}
    return image_class(image_processor=image_processor, tokenizer=tokenizer, **settings)


def save_processor(processor: Any, folder: str | Path) -> None:
    """Write what `load_processor` reads, with and without torchvision."""
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # where no video processor is written, one is made from this
