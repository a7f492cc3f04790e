"""What the settings of parameters, precision and memory can be together; each contradiction is refused by name."""

from __future__ import annotations

from dataclasses import fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vlmr1.errors import SettingError
from vlmr1.models.precision import check_optimizer

if TYPE_CHECKING:
    from vlmr1.config import GRPOConfig

OF_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_vision", "lora_modules_to_save")
OF_LORA += ("use_rslora", "use_dora", "lora_merge_rollout")


def check_parameters(args: GRPOConfig) -> None:
    """SettingError where these settings contradict each other; fills in what follows from them."""
    check_optimizer(args)
    if args.use_peft:
        _check_lora(args)
    else:
        _check_no_lora(args)
    _check_reference(args)
    if args.activation_offload:
        if not args.activation_checkpointing:
            raise SettingError("activation_offload needs gradient_checkpointing: it moves what that keeps")
        if not on_gpu(args):
            raise SettingError(f"activation_offload needs a GPU: on {args.device.type} it has nothing to move")
        kwargs: Any = args.activation_checkpointing_kwargs or {}
        args.activation_checkpointing_kwargs = {**kwargs, "offload": True}
    if args.use_liger_kernel:
        if not on_gpu(args):
            raise SettingError(f"use_liger_kernel needs a GPU: its kernels do not run on {args.device.type}")
        _installed("use_liger_kernel", "liger_kernel", "gpu")


def on_gpu(args: GRPOConfig) -> bool:
    return args.device.type == "cuda"


def _check_lora(args: GRPOConfig) -> None:
    if args.lora_r < 1:
        raise SettingError(f"lora_r is {args.lora_r}: it must be at least 1")
    if args.lora_alpha < 1:
        raise SettingError(f"lora_alpha is {args.lora_alpha}: it must be at least 1")
    if not 0 <= args.lora_dropout < 1:
        raise SettingError(f"lora_dropout is {args.lora_dropout}: it must be at least 0 and below 1")
    if args.lora_dropout and (args.share_prompt or args.pack):
        raise SettingError(
            f"lora_dropout is {args.lora_dropout}, which needs share_prompt=false pack=false: branches of a prompt "
            "would share what was dropped from it"
        )
    if args.freeze_vision and args.lora_vision:
        raise SettingError("lora_vision and freeze_vision contradict each other: adapters in the tower train it")
    if args.freeze_merger is not None:
        raise SettingError(
            "freeze_merger has no effect with use_peft, which freezes all but the adapter; to train the projector name "
            "it in lora_modules_to_save"
        )
    if args.lora_merge_rollout and args.load_in_4bit:
        raise SettingError("lora_merge_rollout cannot be with load_in_4bit: 4-bit weights would be rounded anew")
    _installed("use_peft", "peft", "quant")
    if args.load_in_4bit:
        _installed("load_in_4bit", "bitsandbytes", "quant")


def _check_no_lora(args: GRPOConfig) -> None:
    if args.load_in_4bit:
        raise SettingError("load_in_4bit needs use_peft: 4-bit weights cannot be trained")
    for field in fields(args):
        if field.name in OF_LORA and getattr(args, field.name) not in (field.default, []):
            raise SettingError(f"{field.name} needs use_peft: there is no adapter without it")


def _check_reference(args: GRPOConfig) -> None:
    if args.reference == "auto":
        return
    if args.beta == 0:
        raise SettingError(f"reference={args.reference} needs beta above 0: with beta 0 there is no reference")
    if args.reference == "adapter" and not args.use_peft:
        raise SettingError("reference=adapter needs use_peft: it is the policy with its adapter switched off")


def _installed(setting: str, module: str, extra: str) -> None:
    if find_spec(module) is None:
        raise SettingError(f"{setting} needs {module.replace('_', '-')}: pip install 'vlmr1[{extra}]'")
