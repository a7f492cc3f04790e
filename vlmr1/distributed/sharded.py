"""Engines that shard parameters (ZeRO-3, FSDP2): rollouts with all of them, and a reference model of their kind."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from vlmr1.errors import SettingError

Sharding = Literal["zero3", "fsdp2"]
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def sharding_of(accelerator: Any) -> Sharding | None:
    """How parameters are spread over the ranks; None where each has them all. SettingError for FSDP of version 1."""
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None:
        return "zero3" if deepspeed.zero_stage == 3 else None
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is None:
        return None
    check_fsdp(fsdp.fsdp_version)
    return "fsdp2"


def check_fsdp(version: int) -> None:
    """SettingError for another version than 2."""
    if version != 2:
        raise SettingError("FSDP of version 1 is not supported: set fsdp_version to 2, or use --launch fsdp2")


def check_sharded(args: Any, sharding: Sharding | None, *, engine: bool) -> None:
    """SettingError for settings that an `engine` of several ranks cannot honour, or that sharded weights do not
    allow: 4 bits, a reference in host memory, and with ZeRO-3 what reads weights outside of their modules or what a
    reference that is read again is without."""
    if engine and args.stochastic_rounding:
        raise SettingError("stochastic_rounding needs one process: others add up gradients in the dtype of weights")
    if sharding is None:
        return
    if args.load_in_4bit:
        raise SettingError(f"load_in_4bit is not supported where {sharding} shards the weights: use ddp or zero2")
    if args.use_dora and sharding == "zero3":
        raise SettingError("use_dora is not supported with zero3: peft reads weights that are not gathered; use fsdp2")
    if args.sync_ref_model and args.use_peft and sharding == "zero3":
        raise SettingError(
            "sync_ref_model with use_peft is not supported with zero3, where the reference is read again and has no "
            "adapter: use fsdp2"
        )
    if args.reference == "offload":
        raise SettingError(f"reference=offload is not supported with {sharding}, which shards the reference too")
    if args.use_liger_kernel and args.beta > 0 and sharding == "zero3":
        raise SettingError("use_liger_kernel needs beta 0 with zero3: the reference would be without")


@contextmanager
def whole(model: Any, sharding: Sharding | None) -> Iterator[None]:
    """In this block each rank has every parameter, and forwards of the model and of its parts run without collectives:
    ranks that draw completions of other lengths call them at other times."""
    if sharding is None:
        yield
        return
    with ExitStack() as stack:
        if sharding == "zero3":
            from deepspeed.runtime.zero import GatheredParameters

            stack.enter_context(GatheredParameters(list(model.parameters())))
        else:
            stack.enter_context(_unsharded(model))
        stack.enter_context(_without_hooks(model))
        yield


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """In this block the adapter of a `peft.PeftModel` is off. peft's own way also sets `requires_grad` of the
    parameters that modules hold: with FSDP they may be gathered ones, and what it reads in a first forward stays."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [each for each in model.modules() if isinstance(each, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def release(model: nn.Module) -> None:
    """FSDP leaves some units gathered behind a forward, for a backward; here there is none."""
    _reshard(_units(model))


def keep_float32(accelerator: Any, sharding: Sharding | None) -> None:
    """Where FSDP gathers weights in bfloat16: what forwards return (log-probs) and sums of gradients are float32, as
    with one process; the rest is left to autocast."""
    if sharding == "fsdp2" and accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )


@torch.no_grad()
def round_early(model: Any, accelerator: Any, *, bf16: bool) -> None:
    """With bfloat16, ZeRO-2 rounds all weights when it starts, and its float32 masters begin there. Rounded before the
    reference is copied, that is what the policy is, in the same dtype: the KL begins at 0."""
    deepspeed = accelerator.state.deepspeed_plugin
    if bf16 and deepspeed is not None and deepspeed.zero_stage < 3:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)


@contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    units = _units(model)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        _reshard(units)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _reshard(units: Sequence[FSDPModule]) -> None:
    for unit in units:
        unit.reshard()


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """The engine's forward hooks would release what was gathered."""
    kept = [(module, name, getattr(module, name)) for module in model.modules() for name in HOOKS]
    for module, name, _ in kept:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, hooks in kept:
            setattr(module, name, hooks)


def meet_in_backward(decoder: nn.Module) -> None:
    """The decoder's input always has a gradient. Engines call each other by hooks of what has one: with embeddings that
    are frozen and a tower that is not, ranks without an image would meet the others in another order."""
    decoder.register_forward_pre_hook(_with_gradient, with_kwargs=True)


def _with_gradient(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if torch.is_grad_enabled():
        kwargs["inputs_embeds"].requires_grad_(True)


def gathered_state(model: Any, *, trained_only: bool) -> dict[str, Any]:
    """With FSDP: whole tensors in host memory, on rank 0; every rank has to call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return get_model_state_dict(model, options=options)


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 spread the parameters when they were read."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def sharded_reference(model: nn.Module, accelerator: Any, sharding: Sharding) -> nn.Module:
    """A frozen model, spread over the ranks as the policy is; the wrapper whose call fires the engine's hooks."""
    if sharding == "fsdp2":
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for part in ("optimizer", "scheduler", "train_batch_size"):
        config.pop(part, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine
