"""Quantization as TRL's scripts ask for it: `quantization_config`, or a model that is quantized already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import BitsAndBytesConfig

from vlmr1.errors import SettingError, missing_package
from vlmr1.models import ModelFamily
from vlmr1.models.quantization import check_layers

NAME = "quantization_config"


def asked_for(argument: Any, of_kwargs: Any) -> BitsAndBytesConfig | None:
    """Return the configuration that was given to the trainer or in model_init_kwargs. SettingError for what of it
    cannot be honoured."""
    given = of_kwargs if argument is None else argument
    if given is None:
        return None
    faults = list(_faults(given))
    if argument is not None and of_kwargs is not None:
        faults.append(f"{NAME} is an argument of the trainer and in model_init_kwargs: give it in one place")
    if faults:
        raise SettingError("\n".join(faults))
    return BitsAndBytesConfig(**given) if isinstance(given, dict) else given


def _faults(given: Any) -> Iterator[str]:
    values = given if isinstance(given, dict) else getattr(given, "to_dict", dict)()
    if not isinstance(given, dict | BitsAndBytesConfig):
        yield f"{NAME} is a {type(given).__name__}: only BitsAndBytesConfig(load_in_4bit=True) is supported"
    elif not values.get("load_in_4bit"):
        yield f"{NAME} has load_in_4bit={values.get('load_in_4bit', False)}: only 4 bits are supported"
    else:
        yield from missing_package(NAME, "bitsandbytes", "vlmr1[quant]")
        storage = str(values.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
        if storage != "uint8":
            yield f"{NAME} has bnb_4bit_quant_storage={storage}: 4-bit weights are not sharded here, leave it out"
        if values.get("llm_int8_enable_fp32_cpu_offload"):
            yield f"{NAME} has llm_int8_enable_fp32_cpu_offload: all weights are on one device"


def keeping(asked: BitsAndBytesConfig, family: ModelFamily) -> BitsAndBytesConfig:
    """The configuration that quantizes neither head, which the loss reads, nor tower and projector."""
    found: Any = BitsAndBytesConfig.from_dict(asked.to_dict())
    skipped = [*(asked.llm_int8_skip_modules or []), *family.vision_paths, family.head_path]
    found.llm_int8_skip_modules = list(dict.fromkeys(skipped))
    return found


def is_in_4bit(model: Any) -> bool:
    """Return whether a model has 4-bit weights. SettingError for other quantized weights."""
    if getattr(model, "is_loaded_in_4bit", False):
        check_layers(model)
        return True
    if getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_8bit", False):
        method = getattr(model, "quantization_method", None) or "8 bits"
        raise SettingError(
            f"model: it is quantized ({getattr(method, 'value', method)}): only 4 bits of bitsandbytes are supported"
        )
    return False
