"""LoRA through peft: which modules get an adapter, the adapter merged for a rollout, and adapter checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from vlmr1.errors import SettingError, import_for
from vlmr1.models.family import ModelFamily
from vlmr1.models.frozen import held_dtype
from vlmr1.models.settings import ParameterSettings


def with_lora(model: Any, family: ModelFamily, settings: ParameterSettings) -> Any:
    """The model with an adapter at its linear layers, as a `peft.PeftModel`: the adapter is trained, in float32
    whatever the dtype of the weights, and the rest is frozen. The adapter's first weights are those in the directory
    `adapter`, or follow from `seed`.

    SettingError: peft is not installed, or the modules that get an adapter cannot have one."""
    peft = import_for("use_peft", "peft", "vlmr1[quant]")
    if settings.adapter is not None:
        return _with_adapter_of(peft, model, family, settings, settings.adapter)
    config = peft.LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=target_modules(model, family, settings.lora_target_modules, vision=settings.lora_vision),
        modules_to_save=_kept_modules(model, family, settings.lora_modules_to_save) or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        revision=None if settings.model_revision == "main" else settings.model_revision,
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return peft.get_peft_model(model, config)


def check_adapter(model: Any, family: ModelFamily) -> None:
    """SettingError for a `peft.PeftModel` whose adapter is not at linear layers of decoder, tower and projector."""
    from peft.tuners.lora import LoraLayer

    base = base_of(model)
    config = model.active_peft_config
    if config.peft_type.value != "LORA":
        raise SettingError(f"an adapter of type {config.peft_type.value} cannot be trained: use LoRA")
    places = [*map(attrgetter, (family.decoder_path, *family.vision_paths))]
    inside = {id(module) for place in places for module in place(base).modules()}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and (
            id(module) not in inside or not isinstance(module.get_base_layer(), nn.Linear)
        ):
            raise SettingError(
                f"the adapter has weights at {name}: only linear layers of decoder, tower and projector can have some"
            )
    if config.modules_to_save:
        _kept_modules(base, family, config.modules_to_save)


def _with_adapter_of(peft: Any, model: Any, family: ModelFamily, settings: ParameterSettings, folder: str) -> Any:
    """The model with the adapter in a directory; on the meta device, with its shapes."""
    config = peft.LoraConfig.from_pretrained(folder)
    config.inference_mode, config.lora_dropout = False, settings.lora_dropout
    config.init_lora_weights = True  # the weights are read below
    config.base_model_name_or_path = None  # peft fills in the name of the model
    config.revision = None if settings.model_revision == "main" else settings.model_revision
    config.modules_to_save = _kept_modules(model, family, config.modules_to_save or ()) or None
    linear = set(target_modules(model, family, (), vision=True))
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        raise SettingError(f"adapter: {folder} does not fit the model: {str(error).splitlines()[0]}") from error
    others = sorted(set(adapted.base_model.targeted_module_names) - linear)
    if others:
        raise SettingError(
            f"adapter: {folder} has weights at {others[0]}; only linear layers of decoder, tower and projector can "
            "have some. `vlmr1 merge` makes a model of it, from which a run can start"
        )
    if settings.freeze_vision and any(parameter.requires_grad for parameter in family.vision_parameters(model)):
        raise SettingError(f"freeze_vision: the adapter in {folder} has weights in the vision tower")
    if model.device.type != "meta":
        try:
            restore_adapter(adapted, folder)
        except SafetensorError as error:
            raise SettingError(f"adapter: {folder} cannot be read: {error}") from error
    return adapted


def base_of(model: Any) -> Any:
    """The model that a `peft.PeftModel` wraps, adapter included; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def target_modules(model: Any, family: ModelFamily, names: Sequence[str], *, vision: bool) -> list[str]:
    """Full names of the linear layers that get an adapter: those of the decoder, with `vision` also those of tower and
    projector; where `names` are given, those among them whose last parts are one of these."""
    places = [family.decoder_path, *(family.vision_paths if vision else ())]
    inside = [(place, *each) for place in places for each in attrgetter(place)(model).named_modules()]
    linear = [f"{place}.{name}" for place, name, layer in inside if isinstance(layer, nn.Linear)]
    if not names or list(names) == ["all-linear"]:
        return linear
    for name in names:
        if not any(_ends(each, name) for each in linear):
            of_head = any(module is family.head(model) for each, module in model.named_modules() if _ends(each, name))
            where = "decoder and vision tower" if vision else "decoder (lora_vision adds the vision tower)"
            reason = "is the head, whose weights the loss reads" if of_head else f"is no linear layer of the {where}"
            raise SettingError(f"lora_target_modules: {name!r} {reason}")
    return [each for each in linear if any(_ends(each, name) for name in names)]


def _ends(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _kept_modules(model: Any, family: ModelFamily, names: Sequence[str]) -> list[str]:
    """Full names of the modules that are trained whole beside the adapter. The head and the embeddings cannot be."""
    found = []
    for name in names:
        modules = {each: module for each, module in model.named_modules() if _ends(each, name)}
        if not modules:
            raise SettingError(f"lora_modules_to_save: the model has no module {name!r}")
        for each, module in modules.items():
            if any(part in (family.head(model), model.get_input_embeddings()) for part in module.modules()):
                raise SettingError(f"lora_modules_to_save: {each!r} holds the head or embeddings, which stay frozen")
            found.append(each)
    return found


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """In this block the adapter is part of the weights of its layers, in their dtype; after it the weights are what
    they were, bit for bit: they are kept, not computed back. Costs a second copy of these layers' weights."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kept = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer in layers:
            weight = layer.get_base_layer().weight
            dtype, wide = weight.dtype, held_dtype(weight)
            if wide is not None:  # merged in bfloat16, a weight would be rounded twice
                weight.data = weight.data.to(wide)
            layer.merge(safe_merge=True)  # into a copy
            if wide is not None:
                weight.data = weight.data.to(dtype)
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            if layer.merged:
                layer.unmerge()
            layer.get_base_layer().weight.data = weight


def read_adapter(model: Any, folder: str | Path) -> Any:
    """The `peft.PeftModel` of a base model and the adapter in a directory."""
    peft = import_for(f"{folder} holds an adapter, which", "peft", "vlmr1[quant]")
    config = peft.PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise SettingError(f"{folder} holds an adapter of type {config.peft_type.value}, which is not in the weights")
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(folder))
    except (ValueError, RuntimeError) as error:
        raise SettingError(f"{folder}: its adapter does not fit the model: {str(error).splitlines()[0]}") from error
    restore_adapter(adapted, folder)  # peft ignores weights that it does not know
    return adapted


def adapts_head(model: Any) -> bool:
    """Return whether an adapter has weights at the head or the embeddings of a model."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return any(hasattr(end, "base_layer") or hasattr(end, "modules_to_save") for end in ends)


def restore_adapter(model: Any, folder: str | Path) -> None:
    """The weights of an adapter in a directory into a model that has such an adapter: every one, or a SettingError."""
    from peft import load_peft_weights, set_peft_model_state_dict

    different = f"{folder}: its adapter does not fit this model or run; they differ in"
    try:
        result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    except KeyError as error:  # a module that is saved whole is missing
        raise SettingError(f"{different} {error.args[0]}") from error
    except RuntimeError as error:  # shapes, a line each
        raise SettingError(f"{different} {str(error).splitlines()[-1].strip()}") from error
    own = {name for name in model.state_dict() if "default" in name.split(".")}  # the name of the only adapter
    wrong = [*result.unexpected_keys, *(name for name in result.missing_keys if name in own)]
    if wrong:
        raise SettingError(f"{different} {wrong[0]}")
