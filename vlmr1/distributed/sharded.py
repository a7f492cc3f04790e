"""Sharded parameters (ZeRO-3, FSDP2): full parameters for rollouts, a sharded reference, mixed precision."""

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
    """Return how parameters are sharded, None if every rank has all of them. SettingError for FSDP version 1."""
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None:
        return "zero3" if deepspeed.zero_stage == 3 else None
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is None:
        return None
    check_fsdp(fsdp.fsdp_version)
    return "fsdp2"


def check_fsdp(version: int) -> None:
    """SettingError for an FSDP version other than 2."""
    if version != 2:
        raise SettingError("FSDP version 1 is not supported: set fsdp_version to 2, or use --launch fsdp2")


def check_sharded(args: Any, sharding: Sharding | None, *, engine: bool) -> None:
    """SettingError for settings that are not supported with several ranks (`engine`) or with sharded weights."""
    if engine and args.stochastic_rounding:
        raise SettingError("stochastic_rounding needs one process: several sum gradients in the dtype of the weights")
    if sharding is None:
        return
    if getattr(args, "load_best_model_at_end", False):
        raise SettingError(
            f"load_best_model_at_end is not supported with {sharding}, which shards weights: use save_strategy=best"
        )
    if getattr(args, "rollout_keep_cache", None):
        raise SettingError(
            f"rollout_keep_cache is not supported with {sharding}, which gathers weights for each rollout"
        )
    if args.load_in_4bit:
        raise SettingError(f"load_in_4bit is not supported with {sharding}, which shards weights: use ddp or zero2")
    if args.use_dora and sharding == "zero3":
        raise SettingError(
            "use_dora is not supported with zero3, since peft reads weights that are not gathered: use fsdp2"
        )
    if args.sync_ref_model and args.use_peft and sharding == "zero3":
        raise SettingError(
            "sync_ref_model with use_peft is not supported with zero3, whose reference has no adapter: use fsdp2"
        )
    if args.reference == "offload":
        raise SettingError(f"reference=offload is not supported with {sharding}, which shards the reference")
    if sharding == "zero3" and args.adapter is not None and args.reference_kind == "copy":
        raise SettingError(
            "adapter needs beta 0 or reference=adapter with zero3, whose reference has no adapter: use fsdp2"
        )


@contextmanager
def summon_full_params(model: Any, sharding: Sharding | None) -> Iterator[None]:
    """Context manager in which every rank has all parameters and forwards run without collectives.

    Ranks generate completions of different lengths, so their forwards do not match."""
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
def disable_adapter(model: Any) -> Iterator[None]:
    """Context manager that disables the adapter of a `peft.PeftModel`.

    peft's own also sets `requires_grad` on the parameters of modules, which with FSDP may be the gathered ones."""
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


def reshard(model: nn.Module) -> None:
    """Reshard all FSDP units: some stay gathered after a forward, for a backward that does not come here."""
    _reshard(_units(model))


def set_fsdp_mixed_precision(accelerator: Any, sharding: Sharding | None) -> None:
    """Set the FSDP2 policy for bf16: bfloat16 weights, float32 outputs (log-probs) and gradient reduction.

    Inputs are not cast; autocast casts the rest, as with one process."""
    if sharding == "fsdp2" and accelerator.mixed_precision == "bf16":
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None, cast_forward_inputs=False
        )


@torch.no_grad()
def round_zero2_weights(model: Any, accelerator: Any, *, bf16: bool) -> None:
    """Round the weights to bfloat16 as ZeRO-2 will, before the reference is copied, so that the KL starts at 0."""
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
    """Remove forward hooks, which would release gathered parameters."""
    removed = [(module, name, getattr(module, name)) for module in model.modules() for name in HOOKS]
    for module, name, _ in removed:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for module, name, hooks in removed:
            setattr(module, name, hooks)


def require_input_grads(decoder: nn.Module) -> None:
    """Make the input embeddings of the decoder require a gradient.

    Engines launch collectives from gradient hooks. With frozen embeddings and a trained vision tower, ranks without an
    image would otherwise launch them in another order."""
    decoder.register_forward_pre_hook(_require_grad, with_kwargs=True)


def _require_grad(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if torch.is_grad_enabled():
        kwargs["inputs_embeds"].requires_grad_(True)


def full_state_dict(model: Any, *, trained_only: bool) -> dict[str, Any]:
    """Return the full state dict of an FSDP model on rank 0, in host memory; every rank must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    return get_model_state_dict(model, options=options)


def is_partitioned(model: nn.Module) -> bool:
    """Return whether ZeRO-3 partitioned the parameters when the model was loaded."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def sharded_reference(model: nn.Module, accelerator: Any, sharding: Sharding) -> nn.Module:
    """Shard a frozen model as the policy is and return the wrapper whose call fires the engine's hooks."""
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
