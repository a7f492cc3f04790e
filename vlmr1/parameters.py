"""Which parameters a run trains, and with which precision: frozen parts, adapters, the dtype of gradients."""

from __future__ import annotations

from typing import Any

from vlmr1.config import GRPOConfig
from vlmr1.errors import SettingError
from vlmr1.memory.precision import prepare_trained
from vlmr1.models.adapter import Adapter
from vlmr1.models.lora import with_lora


def choose_trained(model: Any, adapter: Adapter, args: GRPOConfig) -> Any:
    """The model that is trained: the given one with what `args` freezes frozen, or the `peft.PeftModel` around it."""
    if args.use_liger_kernel:
        _choose_liger(model, args)
    if args.use_peft:
        model = with_lora(model, adapter, args)
    else:
        _freeze(model, adapter, tower=args.freeze_vision, merger=args.freeze_merger)
    prepare_trained(model, args)
    return model


def _freeze(model: Any, adapter: Adapter, *, tower: bool, merger: bool | None) -> None:
    """Tower, and projector: by default as the tower."""
    of_merger = {id(parameter) for parameter in adapter.merger_parameters(model)}
    for parameter in adapter.vision_parameters(model):
        frozen = tower if merger is None or id(parameter) not in of_merger else merger
        if frozen:
            parameter.requires_grad_(False)


def _choose_liger(model: Any, args: GRPOConfig) -> None:
    """Which of Liger's kernels `transformers.Trainer` will apply: of layers, not its losses and forwards, in whose place
    the packed forward has its own."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN

    decoder = model.config.get_text_config(decoder=True).model_type
    for kind in (model.config.model_type, decoder):
        if kind not in KNOWN:
            raise SettingError(f"use_liger_kernel: Liger has no kernels for {kind}")
    layers = dict.fromkeys(("rope", "rms_norm", "layer_norm", "swiglu"), True)
    args.liger_kernel_config = layers | dict.fromkeys(("cross_entropy", "fused_linear_cross_entropy"), False)
