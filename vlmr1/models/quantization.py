"""4-bit weights of the decoder's linear layers: nf4 with double quantization, by bitsandbytes."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from vlmr1.errors import SettingError
from vlmr1.models.family import ModelFamily

BLOCK = 64  # weights that share a scale
QUANTIZATION = "quantization_config.json"  # of an adapter checkpoint: how its base was quantized
CONFIGS = (QUANTIZATION, "config.json")  # earlier checkpoints have the configuration of the base


def four_bit(family: ModelFamily, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the quantization config. Head, embeddings, tower and projector are excluded: the loss reads the head."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[*family.vision_paths, family.head_path],
    )


def quantize_empty(model: Any, family: ModelFamily, dtype: torch.dtype) -> None:
    """Give a model on the meta device the layers, weights and scales that loading it with `four_bit` gives it."""
    from bitsandbytes import functional
    from bitsandbytes.nn.modules import Linear4bit
    from transformers.quantizers.auto import AutoHfQuantizer

    with torch.device("cpu"):  # the library keeps this table for layers that are quantized later
        functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())
    quantizer = AutoHfQuantizer.from_config(four_bit(family, dtype), pre_quantized=False)
    quantizer.preprocess_model(model, device_map=None)
    model.is_loaded_in_4bit = True
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            weight._quantize("meta")
            if module.bias is not None:  # loading gives it the model's dtype
                module.bias = torch.nn.Parameter(module.bias.detach().to(model.dtype))
    check_layers(model)


def scales_of(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that belong to a 4-bit weight beside it, by their path in its `quant_state`; empty for others."""
    state = getattr(weight, "quant_state", None)
    names = ("absmax", "code", "offset", "state2.absmax", "state2.code") if state is not None else ()
    return {name: attrgetter(name)(state) for name in names}


def numbers_of(weight: torch.Tensor) -> int:
    """Return the number of elements of a weight, in 4 bits or not."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else state.shape.numel()


def quantization_of(folder: str | Path) -> BitsAndBytesConfig | None:
    """Return how the base of an adapter was quantized in training, or None where it was not."""
    for path in (Path(folder) / name for name in CONFIGS):
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        quantization = config if path.name == QUANTIZATION else config.get("quantization_config")
        if quantization:
            return BitsAndBytesConfig.from_dict(quantization)  # type: ignore[reportReturnType]
    return None


def save_quantization(model: Any, folder: str | Path) -> None:
    """Write how a base model was quantized, if it was, into the directory of its adapter."""
    config = getattr(model.config, "quantization_config", None)
    if config is not None:
        (Path(folder) / QUANTIZATION).write_text(json.dumps(config.to_dict(), indent=1), encoding="utf-8")


def check_not_quantized(name: str | Path, config: Any = None) -> None:
    """SettingError for a local directory, file or hub id with quantized weights: GGUF, or what its `config` says."""
    kind = None
    if config is None:
        files = {path.suffix for path in Path(name).glob("*.*")} if Path(name).is_dir() else set()
        is_gguf = str(name).lower().endswith("gguf") or (".gguf" in files and ".safetensors" not in files)
        kind = "GGUF" if is_gguf else None
    else:
        parts = (config, getattr(config, "text_config", None))
        found: Any = next(filter(None, (getattr(part, "quantization_config", None) for part in parts)), None)
        if found is not None:
            method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
            kind = str(getattr(method, "value", method) or "quantized").upper()
    if kind is not None:
        raise SettingError(
            f"model_name_or_path: {name} has {kind} weights, which are not read here. Give the model that they were "
            "made from; use_peft with load_in_4bit quantizes it while it is read"
        )


def check_layers(model: Any) -> None:
    """Work around two faults of bitsandbytes 0.50 on CPU.

    It dequantizes rows wrongly whose length is not a multiple of its blocks: SettingError. With AVX-512 and bfloat16 it
    repacks weights at the first forward without gradient, which rounds the scales. Rollouts would then sample from
    another model than the trained one, so repacking is disabled."""
    from bitsandbytes.nn.modules import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            if module.weight.device.type == "cpu" and module.in_features % BLOCK:
                raise SettingError(
                    f"load_in_4bit on CPU needs layers whose inputs are a multiple of {BLOCK}: {name} has "
                    f"{module.in_features}"
                )
            module.support_avx512bf16_for_cpu = False
