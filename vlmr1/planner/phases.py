"""The phases of a step as dry runs: the trainer's own policy, rollout schedule and loss on a model without data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from vlmr1.grpo.loss import Objective
from vlmr1.grpo.naive import NaivePolicy
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models import family_for
from vlmr1.models.features import FeatureCache
from vlmr1.planner.dry_run import HOST, DryRun
from vlmr1.planner.groups import groups_of, largest_pack, prompts_of
from vlmr1.planner.inputs import PlanInputs
from vlmr1.planner.policy import ACTIVATIONS, GRADIENTS, DryOnCuda, DryPacked, checkpoints_on_host, vision_counted
from vlmr1.planner.rollout import generate, rollout
from vlmr1.types import Pack
from vlmr1_kernels import GRPOSettings

Bytes = dict[str, int]  # by cause


def dry_phases(inputs: PlanInputs, model: Any, dry: DryRun) -> Mapping[str, Bytes]:
    """Phase -> bytes by cause at its peak, beyond weights, optimizer and reference model, which are there all along;
    "host" has what is in host memory.

    `model` is one without data, as `variant` makes it."""
    family = family_for(model.config)
    cache = FeatureCache() if inputs.vision_frozen and inputs.share_vision else None
    prompts = prompts_of(inputs, family, model)
    options = {"temperature": 1.0, "dtype": torch.bfloat16 if inputs.bf16 else None, "features": cache}
    policy: PackedPolicy
    if inputs.share_prompt or inputs.pack:
        policy = (DryOnCuda if inputs.device == "cuda" else DryPacked)(dry, model, family, **options)
    else:
        policy = NaivePolicy(model, family, **options)
    pack, several = largest_pack(groups_of(inputs, prompts[: inputs.prompts_per_device]), inputs)
    draw: Callable[..., None] = rollout if inputs.rollout_engine == "native" else generate
    found: dict[str, Bytes] = {}
    with vision_counted(family, model, dry), dry:
        draw(inputs, policy, prompts, dry)
        found["rollout"] = dict(dry.at_peak)
        if inputs.reference != "none":
            dry.restart()
            with dry.of(ACTIVATIONS):
                policy.logprobs(pack)
            found["reference"] = dict(dry.at_peak)
        dry.restart()
        with dry.of(ACTIVATIONS):
            _update(inputs, model, policy, pack, dry, several=several)
        found["policy"] = dict(dry.at_peak)
        found[HOST] = {ACTIVATIONS: dry.most_on_host}
    return found


def _update(inputs: PlanInputs, model: Any, policy: PackedPolicy, pack: Pack, dry: DryRun, *, several: bool) -> None:
    """Forward and backward of one pack; with several, the gradients of those before it are there."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for parameter in trained:
        if parameter.dtype.itemsize < 4:
            parameter.grad_dtype = torch.float32  # as `precision.prepare_trained` has it
    if several:
        with dry.of(GRADIENTS):
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter, dtype=torch.float32)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: dry.is_of(p.grad, GRADIENTS)) for p in trained]
    width = model.config.get_text_config(decoder=True).hidden_size
    kept = checkpoints_on_host(dry, len(pack.input_ids), width) if inputs.activation_offload else nullcontext()
    with policy.attention():
        with kept:
            loss, _ = policy.loss(pack, Objective(GRPOSettings(beta=0.0), 1.0))
        loss.backward()
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
