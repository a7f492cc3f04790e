"""Directories of PEFT adapters: what is in them, which model they are for, and the settings of a run that starts from
one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmr1.errors import SettingError
from vlmr1.lifecycle.checkpoint import ADAPTER_CONFIG, is_adapter

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE = ("model*.safetensors", "pytorch_model*.bin")
# Settings that an adapter decides, with their names in its configuration.
OF_ADAPTER = {"lora_r": "r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
MODULES = ("lora_target_modules", "lora_vision", "lora_modules_to_save")  # which modules it has
# Parts of a LoRA configuration that need more than weights at linear layers.
UNSUPPORTED = ("layer_replication", "trainable_token_indices", "target_parameters", "lora_bias", "use_qalora")
CHANGES_BASE = ("pissa", "olora", "loftq", "corda")  # values of init_lora_weights


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """Return the configuration of the adapter in a directory."""
    path = Path(folder) / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise SettingError(f"{path} is no configuration of an adapter")
    return config


def base_name(folder: str | Path) -> tuple[str, str]:
    """The model that an adapter in a directory was trained on: local directory or hub id, and revision."""
    config = adapter_config(folder)
    name = config.get("base_model_name_or_path")
    if not name:
        raise SettingError(f"{folder}: its {ADAPTER_CONFIG} does not name the model that it is for")
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise SettingError(
            f"{folder}: the model that it is for, {name}, is not there: correct base_model_name_or_path in its "
            f"{ADAPTER_CONFIG}, or train with adapter={folder} and model_name_or_path"
        )
    return name, config.get("revision") or "main"


def check_not_both(folder: str | Path, setting: str) -> None:
    """SettingError for a directory that holds a whole model and an adapter."""
    if is_adapter(folder) and any(path for pattern in WHOLE for path in Path(folder).glob(pattern)):
        raise SettingError(
            f"{setting}: {folder} holds a whole model and an adapter. Which one? For the adapter, give "
            f"adapter={folder} to `vlmr1 train`, or move adapter_* to a directory of their own; for the model, move "
            f"{ADAPTER_CONFIG} away"
        )


def start_from_adapter(settings: Any) -> Iterator[str]:
    """Where `adapter` or `model_name_or_path` names an adapter, fill in the settings that follow from it: `use_peft`,
    the base model, rank and scale. Yield the faults."""
    name = settings.model_name_or_path
    if name is not None and is_adapter(name):
        if settings.adapter is not None:
            yield f"model_name_or_path: {name} holds an adapter, as {settings.adapter} does: name the base model"
            return
        check_not_both(name, "model_name_or_path")
        settings.adapter, settings.model_name_or_path = name, None
    if settings.adapter is None:
        return
    folder = Path(settings.adapter)
    if not is_adapter(folder):
        yield f"adapter: {folder} is no local directory with an {ADAPTER_CONFIG}; `hf download` fetches one"
        return
    if settings.model_name_or_path is None:
        settings.model_name_or_path, revision = base_name(folder)
        if settings.model_revision == "main":
            settings.model_revision = revision
    settings.use_peft = True
    config = adapter_config(folder)
    yield from _unsupported(folder, config)
    for setting, key in OF_ADAPTER.items():
        value = config.get(key) or type(getattr(settings, setting))()
        if not settings.is_default(setting) and getattr(settings, setting) != value:
            yield f"{setting} is {getattr(settings, setting)}, but the adapter in {folder} has {value}: leave it out"
        setattr(settings, setting, value)
    for setting in MODULES:
        if not settings.is_default(setting):
            yield f"{setting} has no effect on the adapter in {folder}, which has its modules: leave it out"


def _unsupported(folder: Path, config: dict[str, Any]) -> Iterator[str]:
    """Yield why the adapter in a directory cannot be trained on."""
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"adapter: {folder} holds one of type {kind}, and only LORA is trained"
        return
    if not any((folder / name).is_file() for name in WEIGHTS):
        yield f"adapter: {folder} has no {WEIGHTS[0]}"
    found = [name for name in UNSUPPORTED if config.get(name)]
    found += ["bias"] if config.get("bias", "none") != "none" else []
    if str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        found.append("init_lora_weights")  # the adapter is for weights that the base model does not have
    for name in found:
        yield (
            f"adapter: {folder} has {name}={config[name]!r}, which cannot be trained on: `vlmr1 merge` makes a model "
            "of it, from which a run can start"
        )
