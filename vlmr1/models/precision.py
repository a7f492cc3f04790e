"""Optimizers that move weights of each dtype, and gradients that accumulate in float32.

At a learning rate of 1e-6 an update is smaller than half the distance between neighbouring bfloat16 numbers: rounded to
the nearest, nearly every weight stays where it is (1 to 2% of the float32 displacement in 100 steps). Weights are
therefore float32 (masters, with `bf16` for the computation), or bfloat16 with stochastic rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmr1.distributed.sharded import is_partitioned
from vlmr1.errors import SettingError
from vlmr1.models.optimizers import OPTIMIZERS

# The one whose bfloat16 weights go where float32 weights would, in expectation.
STOCHASTIC = "adamw_torch_8bit"
ROUND = "bf16_stochastic_round=True"  # what `optim_args` says to it
REFUSED = {"adamw_torch_4bit": "its 4-bit moments move weights 8 to 11% less than float32 ones; use adamw_torch_8bit"}
BFLOAT16 = (
    "updates of bfloat16 weights are rounded away at the learning rates of GRPO. Use model_dtype=float32 with bf16=true"
    f" (float32 masters), or optim={STOCHASTIC} with stochastic_rounding=true, or use_peft=true"
)


def optimizer_name(optim: Any) -> str:
    """The name of a value of `optim`, which transformers makes an enumeration."""
    return str(getattr(optim, "value", optim))


def check_optimizer(settings: Any) -> None:
    """SettingError where `optim` is not one of OPTIMIZERS or contradicts the dtype of the weights; `settings` are those
    of `ParameterSettings`, which checks the device. Adds `stochastic_rounding` to `optim_args`."""
    name = optimizer_name(settings.optim)
    if name not in OPTIMIZERS:
        reason = REFUSED.get(name, f"it was not tested here; use {', '.join(OPTIMIZERS)}")
        raise SettingError(f"optim is {name!r}: {reason}")
    given = [each for each in (settings.optim_args or "").replace(" ", "").split(",") if each]
    for each in given:
        if each.startswith("bf16_stochastic_round") and not (settings.stochastic_rounding and each == ROUND):
            raise SettingError(f"optim_args: {each} is the setting stochastic_rounding here")
    if settings.stochastic_rounding:
        if name != STOCHASTIC:
            raise SettingError(f"stochastic_rounding needs optim={STOCHASTIC}: {name} rounds to the nearest number")
        if settings.model_dtype != "bfloat16" or settings.use_peft:
            what = "use_peft trains float32 weights" if settings.use_peft else "model_dtype is float32"
            raise SettingError(f"stochastic_rounding has no effect: {what}")
        settings.optim_args = ",".join([*(each for each in given if each != ROUND), ROUND])
    elif settings.model_dtype == "bfloat16" and not settings.use_peft:
        raise SettingError(f"model_dtype=bfloat16 with optim={name}: {BFLOAT16}")


def prepare_trained(model: nn.Module, settings: Any) -> None:
    """Gradients of trained bfloat16 weights are float32, and accumulate as such over packs: 4 bytes a weight, not 2.
    SettingError where such weights would be rounded to the nearest, or nothing is trained."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trained:
        raise SettingError("nothing is trained: every weight is frozen")
    # ZeRO-3 reads bfloat16 weights, and keeps float32 ones beside them.
    masters = settings.bf16 and is_partitioned(model)
    for name, parameter in trained:
        if parameter.dtype.itemsize < 4 and not masters:
            if not settings.stochastic_rounding:
                dtype = str(parameter.dtype).removeprefix("torch.")
                if settings.use_peft:
                    raise SettingError(f"{name} is trained in {dtype}: lora_modules_to_save needs model_dtype=float32")
                raise SettingError(f"{name} is trained in {dtype}: {BFLOAT16}")
            parameter.grad_dtype = torch.float32  # type: ignore[attr-defined]


def zero_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Zeros in the dtype that the parameter's gradient has."""
    dtype: Any = getattr(parameter, "grad_dtype", None) or parameter.dtype
    return torch.zeros_like(parameter, dtype=dtype)
