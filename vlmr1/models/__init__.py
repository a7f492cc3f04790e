"""Model families and loading: `family_of` selects a family, `load_model` and `load_processor` read a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from vlmr1.errors import SettingError
from vlmr1.lifecycle.checkpoint import is_adapter
from vlmr1.models.adapters import base_name, check_not_both
from vlmr1.models.families.glm4v import Glm4vFamily
from vlmr1.models.families.idefics3 import Idefics3Family
from vlmr1.models.families.internvl import InternVLFamily
from vlmr1.models.families.qwen3_vl import Qwen3VLFamily
from vlmr1.models.families.qwen_vl import QwenVLFamily
from vlmr1.models.family import ModelFamily
from vlmr1.models.lora import adapts_head, base_of, read_adapter
from vlmr1.models.processor import load_processor
from vlmr1.models.quantization import check_layers, check_not_quantized, four_bit, quantization_of

FAMILIES: tuple[type[ModelFamily], ...] = (QwenVLFamily, Qwen3VLFamily, InternVLFamily, Glm4vFamily, Idefics3Family)
BY_TYPE: dict[str, type[ModelFamily]] = {model_type: family for family in FAMILIES for model_type in family.model_types}
HOW_TO_ADD = "docs/models.md shows how to add one"

__all__ = [
    "BY_TYPE",
    "ModelFamily",
    "check_dropout",
    "empty_model",
    "family_for",
    "family_of",
    "load_model",
    "load_processor",
    "model_type_of",
]


def family_of(model: Any) -> ModelFamily:
    """Return the family of a model. SettingError where it is not supported."""
    return family_for(model.config)


def family_for(config: Any) -> ModelFamily:
    """Return the family of a config. SettingError: no such family, or its decoder cannot share a prompt."""
    reason = _cannot_share(config.get_text_config(decoder=True))
    if reason is not None:
        raise SettingError(f"model_name_or_path: {config.model_type} {reason}; {HOW_TO_ADD}")
    if config.model_type not in BY_TYPE:
        known = ", ".join(BY_TYPE)
        raise SettingError(f"model_name_or_path: {config.model_type} is not supported, only {known}; {HOW_TO_ADD}")
    return BY_TYPE[config.model_type]()


def check_dropout(config: Any) -> None:
    """Raise SettingError where the decoder has dropout: branches of a prompt would share its dropout mask."""
    decoder = config.get_text_config(decoder=True)
    for name, value in decoder.to_dict().items():
        if "dropout" in name and value:
            raise SettingError(
                f"share_prompt and pack are exact only without dropout, and this model's {name} is {value}: "
                "set both to false, or the model's to 0"
            )


def _cannot_share(decoder: Any) -> str | None:
    """Return why this decoder cannot compute the branches of a prompt in one row, or None."""
    kinds = set(getattr(decoder, "layer_types", None) or ())
    if not kinds and getattr(decoder, "sliding_window", None):
        kinds = {"sliding_attention"}  # such configs do not name their only kind of layer
    for kind in sorted(kinds - {"full_attention"}):
        if "sliding" in kind or "chunked" in kind:
            return f"has layers of {kind}, which only sees a part of a shared prompt"
        return f"has layers of {kind}, which would read one branch of a group into the next"
    experts = [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(decoder, name, 0)]
    if experts:
        return f"routes tokens to experts ({experts[0]}), which was not tested with a shared prompt"
    return None


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    revision: str = "main",
    trust_remote_code: bool = False,
    compute_dtype: torch.dtype | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Load a local directory or hub id of a supported family.

    With `compute_dtype` the decoder's linear layers are quantized to 4 bits and compute in it; `quantization` is
    another way to do it. For an adapter checkpoint the base model is loaded, quantized as in training, and the adapter
    is applied."""
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if is_adapter(name):
        check_not_both(name, "model_name_or_path")
        options["revision"] = base_name(name)[1]
        if compute_dtype is None and quantization is None:
            quantization = quantization_of(name)
        options |= {"dtype": dtype, "attn_implementation": attn_implementation}
        options |= {"compute_dtype": compute_dtype, "quantization": quantization}
        adapted = base_of(read_adapter(load_model(base_name(name)[0], **options), name))
        if adapts_head(adapted):
            raise SettingError(f"{name}: its adapter is at head or embeddings: `vlmr1 merge` makes a model of it")
        return adapted
    try:
        config = _config(name, options)
        family = family_for(config)
        if compute_dtype is not None:
            quantization = four_bit(family, compute_dtype)
        if quantization is not None:
            options["quantization_config"] = quantization
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name, config=config, dtype=dtype, attn_implementation=attn_implementation, **options
        )
        if quantization is not None:
            check_layers(model)
        # With ZeRO-3 the library keeps unused conversions, and would save other names than it loaded.
        if model._weight_conversions:
            model._weight_conversions = [each for each in model._weight_conversions if each.was_used()]
        return model
    except OSError as error:
        raise SettingError(f"model_name_or_path: {error}") from error


def empty_model(
    source: str | Path | PreTrainedConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str,
    revision: str,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """The model of a local directory, hub id or configuration without its weights, on the meta device."""
    config = source
    if not isinstance(config, PreTrainedConfig):
        config = _config(config, {"revision": revision, "trust_remote_code": trust_remote_code})
    options = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, **options)


def model_type_of(name: str | Path, *, revision: str = "main", trust_remote_code: bool = False) -> str:
    """Return the model type of a local directory or hub id, of an adapter its base's. SettingError where it is not
    supported."""
    if is_adapter(name):
        name, revision = base_name(name)
    try:
        config = _config(name, {"revision": revision, "trust_remote_code": trust_remote_code})
    except OSError as error:
        raise SettingError(f"model_name_or_path: {error}") from error
    family_for(config)
    return config.model_type


def _config(name: str | Path, options: dict[str, Any]) -> Any:
    check_not_quantized(name)
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except ValueError as error:  # an unknown model type, or none
        reason = str(error).splitlines()[0]
        raise SettingError(f"model_name_or_path: {reason}; {HOW_TO_ADD}") from error
    check_not_quantized(name, config)
    return config
