"""Parameters that a run trains, and their precision: frozen parts, adapters, the dtype of gradients."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from vlmr1.distributed.preflight import undivided
from vlmr1.errors import SettingError
from vlmr1.models import empty_model, family_of
from vlmr1.models.family import ModelFamily
from vlmr1.models.lora import base_of, check_adapter, with_lora
from vlmr1.models.precision import prepare_trained
from vlmr1.models.quantization import quantize_empty
from vlmr1.models.settings import ParameterSettings


def base_and_family(given: Any) -> tuple[Any, ModelFamily]:
    """The model, which may be given in a `peft.PeftModel`, and its family."""
    model = base_of(given)
    return model, family_of(model)


def choose_trained(model: Any, family: ModelFamily, settings: ParameterSettings) -> Any:
    """The model that is trained: the given one, partly frozen as `settings` say, or the `peft.PeftModel` around it.
    A given `peft.PeftModel` is trained as it is."""
    if settings.load_in_4bit != bool(getattr(base_of(model), "is_loaded_in_4bit", False)):
        state = "not quantized" if settings.load_in_4bit else "quantized to 4 bits"
        raise SettingError(f"load_in_4bit is {settings.load_in_4bit}, and the model is {state}")
    if base_of(model) is model:
        model = with_frozen(model, family, settings)
    else:
        check_adapter(model, family)
    prepare_trained(model, settings)
    return model


def planned_model(source: str | PreTrainedConfig, settings: ParameterSettings) -> Any:
    """The model that a run from this local directory, hub id or configuration trains, on the meta device. Only the
    configuration is read."""
    dtype, attention = getattr(torch, settings.model_dtype), settings.attn_implementation
    with undivided(settings.deepspeed_plugin):
        model: Any = empty_model(source, dtype=dtype, attn_implementation=attention, **settings.source)
        family = family_of(model)
        if settings.load_in_4bit:
            quantize_empty(model, family, settings.compute_dtype)
        return with_frozen(model, family, settings)


def with_frozen(model: Any, family: ModelFamily, settings: ParameterSettings) -> Any:
    """Freeze parts of a model, or wrap it with an adapter, whatever its weights are."""
    if settings.use_peft:
        return with_lora(model, family, settings)
    _freeze(model, family, tower=settings.freeze_vision, merger=settings.freeze_merger)
    return model


def _freeze(model: Any, family: ModelFamily, *, tower: bool, merger: bool | None) -> None:
    """Tower, and projector: by default as the tower."""
    of_merger = {id(parameter) for parameter in family.merger_parameters(model)}
    for parameter in family.vision_parameters(model):
        frozen = tower if merger is None or id(parameter) not in of_merger else merger
        if frozen:
            parameter.requires_grad_(False)
