"""Parameters that a run trains, and their precision: frozen parts, adapters, the dtype of gradients."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.integrations.liger import apply_liger_kernel

from vlmr1.distributed.preflight import undivided
from vlmr1.errors import SettingError
from vlmr1.models import empty_model, family_of
from vlmr1.models.family import ModelFamily
from vlmr1.models.lora import base_of, check_adapter, with_lora
from vlmr1.models.precision import prepare_trained
from vlmr1.models.quantization import quantize_empty
from vlmr1.models.settings import ParameterSettings

COMPOSED = ("internvl", "smolvlm")  # whose decoder Liger looks up by its own type
# Liger has no rotary kernel for GLM-4V, and of Qwen2-VL it replaces a function that transformers 5 does not have.
OWN_ROPE = ("qwen2_vl", "qwen2_5_vl", "glm4v")


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


def apply_liger(model: Any) -> dict[str, bool]:
    """Patch the model with Liger's kernels of layers and return the `liger_kernel_config`.

    `transformers.Trainer` does the same, but after the reference is copied. Liger's losses and forwards stay off: the
    packed forward has its own."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN

    kind = model.config.model_type
    for needed in (kind, model.config.get_text_config(decoder=True).model_type)[: 2 if kind in COMPOSED else 1]:
        if needed not in KNOWN:
            raise SettingError(f"use_liger_kernel: Liger has no kernels for {needed}")
    layers = dict.fromkeys(("rms_norm", "layer_norm", "swiglu"), True) | {"rope": kind not in OWN_ROPE}
    config = layers | dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy"), False)
    try:
        apply_liger_kernel(model, config)
    except ImportError as error:
        versions = f"Liger {version('liger_kernel')}, transformers {version('transformers')}"
        raise SettingError(f"use_liger_kernel: Liger's kernels do not fit {kind} here ({versions}): {error}") from error
    return config
