"""Load and save processors: the stock class with torchvision, an image-only class without it."""

from __future__ import annotations

import json
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, Idefics3Processor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from vlmr1.lifecycle.checkpoint import is_adapter
from vlmr1.models.adapters import base_name

# SmolVLM's class calls its video processor for every prompt; for images Idefics3's class is equivalent.
IN_PLACE_OF = {"SmolVLMProcessor": Idefics3Processor}
VIDEO = "video_preprocessor_config.json"
OWN = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")  # of a directory with a processor


@cache
def image_only(stock: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Return a stock processor class without its video processor, which needs torchvision, under the same name."""
    base: type[ProcessorMixin] = IN_PLACE_OF.get(stock.__name__, stock)
    parameters = dict(signature(base.__init__).parameters)
    left_out = {"video_processor": None} if parameters.pop("video_processor", None) else {}

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **left_out, **kwargs)

    def reduce(self: Any) -> tuple:
        return _empty, (stock,), self.__dict__

    # The library takes the parts that it loads and saves from the signature.
    kept = signature(base.__init__).replace(parameters=list(parameters.values()))
    init.__signature__ = kept  # type: ignore[attr-defined]
    return type(stock.__name__, (base,), {"__init__": init, "__reduce__": reduce})  # type: ignore[return-value]


def _empty(stock: type[ProcessorMixin]) -> ProcessorMixin:
    return object.__new__(image_only(stock))


def load_processor(model: str | Path, *, base: str | None = None, **kwargs: Any) -> ProcessorMixin:
    """Load the processor of a local directory or hub id; `kwargs` (revision, trust_remote_code) apply to every part.

    An adapter without a processor beside it has that of its `base`, by default the model that it names."""
    if is_adapter(model):
        if base is None:
            base, kwargs["revision"] = base_name(model)
        has_own = all(any((Path(model) / name).is_file() for name in names) for names in (OWN[:1], OWN[1:]))
        model = model if has_own else base
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(model, **kwargs)
    image_class = image_only(PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(base or model, **kwargs))])
    tokenizer = AutoTokenizer.from_pretrained(model, **kwargs)
    image_processor = AutoImageProcessor.from_pretrained(model, **kwargs)
    written, _ = image_class.get_processor_dict(model, **kwargs)
    known = signature(image_class).parameters.keys() - set(image_class.get_attributes())
    settings = {"chat_template": tokenizer.chat_template}
    settings |= {name: value for name, value in written.items() if name in known}
    processor = image_class(image_processor=image_processor, tokenizer=tokenizer, **settings)
    video = written.get("video_processor") or _video_settings(model, kwargs.get("revision"))
    processor.video_settings = video  # type: ignore[attr-defined] - kept for `save_processor`
    return processor


def _video_settings(model: str | Path, revision: str | None) -> dict[str, Any] | None:
    """Return the settings of a model's video processor, if it has a file of them."""
    path = cached_file(str(model), VIDEO, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def save_processor(processor: Any, folder: str | Path) -> None:
    """Save a processor for `load_processor`, with and without torchvision. The settings of the video processor are
    those that the processor was loaded with."""
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # without a saved video processor, one is created from this
    if getattr(processor, "video_processor", None) is not None:
        processor.video_processor.save_pretrained(folder)
    elif getattr(processor, "video_settings", None):
        (Path(folder) / VIDEO).write_text(json.dumps(processor.video_settings, indent=2), encoding="utf-8")
