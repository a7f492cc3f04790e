"""`--deepspeed FILE`: a DeepSpeed configuration of the user, joined with what training here depends on."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmr1.errors import SettingError

CONFIGS = Path(__file__).parent / "configs"
VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
# Parts that are used as they are; all others have a setting, or are refused.
KEPT = ("zero_optimization", "steps_per_print", "wall_clock_breakdown", "communication_data_type", "data_types")
KEPT += ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "comms_logger", "flops_profiler", "aio")
# What a part must be, unless it is left out or "auto", and the settings that are used instead.
INSTEAD = {
    "gradient_clipping": "max_grad_norm",
    "gradient_accumulation_steps": "prompts_per_device",
    "train_batch_size": "prompts_per_device",
    "train_micro_batch_size_per_gpu": "prompts_per_device",
    "optimizer": "optim, learning_rate, adam_beta1, adam_beta2, adam_epsilon and weight_decay",
    "scheduler": "lr_scheduler_type and warmup_steps",
    "fp16": "bf16",
    "amp": "bf16",
}
ADAMW = ("adam", "adamw")


def read_deepspeed(file: str, *, bf16: bool) -> dict[str, Any]:
    """Return the configuration of a file, or of a text in JSON, with ours where it says nothing.

    An AdamW whose values are "auto" is left out: the run's own optimizer is that. SettingError names all that a setting
    says otherwise, or that is not supported."""
    given = _read(file)
    name = "--deepspeed" if file.lstrip().startswith("{") else f"--deepspeed {file}"
    faults = [f"{name}: {fault}" for fault in _faults(given, bf16)]
    if faults:
        raise SettingError("\n".join(faults))
    zero = given["zero_optimization"]
    ours = json.loads((CONFIGS / f"{engine_name(given)}.json").read_text(encoding="utf-8"))
    ours |= {key: value for key, value in given.items() if key in KEPT}
    if zero["stage"] == 3:
        ours["zero_optimization"] = zero | {"stage3_gather_16bit_weights_on_model_save": True}  # for checkpoints
    return ours


def use_deepspeed(config: Mapping[str, Any]) -> None:
    """Have accelerate use a configuration in this process."""
    text = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", VARIABLE: text}


def engine_name(config: Mapping[str, Any]) -> str:
    """Return the name of the launch with the stage of a configuration."""
    zero = config["zero_optimization"]
    return f"zero{zero['stage']}{'-offload' if any(_offloads(zero)) else ''}"


def engine_of_environment() -> str:
    """Return the name of the launch that the environment of this process asks for."""
    value = os.environ.get(VARIABLE)
    if value is None:
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2)}"
    return Path(value).stem if value.endswith(".json") else engine_name(json.loads(base64.urlsafe_b64decode(value)))


def _read(file: str) -> dict[str, Any]:
    try:
        text = file if file.lstrip().startswith("{") else Path(file).read_text(encoding="utf-8")
        given = json.loads(text)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise SettingError(f"--deepspeed {file}: {reason}; --launch zero2 or zero3 needs no file") from error
    if not isinstance(given, dict):
        raise SettingError(f"--deepspeed {file}: a JSON object is expected")
    return given


def _faults(given: Mapping[str, Any], bf16: bool) -> Iterator[str]:
    zero = given.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    stage = zero.get("stage")
    if stage not in (2, 3):
        yield f"zero_optimization.stage is {stage}: 2 or 3, or use --launch ddp"
    elif {*_offloads(zero)} - {"cpu"}:
        yield "zero_optimization: only offload to cpu is supported"
    for name, value in given.items():
        if name in INSTEAD and not _is_auto(name, value):
            yield f"{name}: use {INSTEAD[name]}, and 'auto' in the file"
        elif name == "bf16" and value.get("enabled", False) not in ("auto", bf16):
            yield f"bf16.enabled is {value['enabled']}, but the setting bf16 is {bf16}"
        elif name not in (*INSTEAD, *KEPT, "bf16"):
            yield f"{name} is not supported"


def _is_auto(name: str, value: Any) -> bool:
    """Return whether a part leaves its values to the settings."""
    if name == "optimizer":
        values = value.get("params", {}).values()
        return str(value.get("type")).lower() in ADAMW and all(each == "auto" for each in values)
    if name in ("fp16", "amp"):
        return value.get("enabled", False) in (False, "auto")
    return value == "auto"


def _offloads(zero: Mapping[str, Any]) -> list[str]:
    """Devices that hold what is offloaded."""
    parts = (zero.get(f"offload_{name}") or {} for name in ("optimizer", "param"))
    return [part["device"] for part in parts if part.get("device", "none") != "none"]
