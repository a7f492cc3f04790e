"""The passes of a step as dry runs: the trainer's own policy, rollout scheduler and loss on a model without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from vlmr1.grpo.loss import Objective
from vlmr1.grpo.naive import NaivePolicy
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models import family_for
from vlmr1.models.features import FeatureCache
from vlmr1.models.lora import base_of, merged
from vlmr1.planner.dry_run import ACTIVATIONS, GRADIENTS, HOST, WEIGHTS, DryRun
from vlmr1.planner.job import Job, largest_pack, prompts_of
from vlmr1.planner.policy import DryOnCuda, DryPacked, checkpoints_on_host, count_fused_layers, vision_counted
from vlmr1.planner.rollout import generate, rollout
from vlmr1_kernels import GRPOSettings, use

Bytes = dict[str, int]  # by cause
KEPT = "kept"


def policy_of(job: Job, trained: Any, dry: DryRun) -> PackedPolicy:
    """The policy of a model without data, or of the `peft.PeftModel` around it."""
    args, model = job.args, base_of(trained)
    family = family_for(model.config)
    if job.device == "cuda":
        count_fused_layers(family, args.fused_layers)
    frozen = not any(parameter.requires_grad for parameter in family.vision_parameters(model))
    cache = FeatureCache() if frozen and args.share_vision else None
    options = {"temperature": args.temperature, "dtype": torch.bfloat16 if args.bf16 else None, "features": cache}
    if args.share_prompt or args.pack:
        return (DryOnCuda if job.device == "cuda" else DryPacked)(dry, model, family, **options)
    return NaivePolicy(model, family, **options)


@contextmanager
def merged_for_rollout(job: Job, trained: Any, dry: DryRun) -> Iterator[None]:
    """In this block the adapter is merged where the rollout has it so."""
    with ExitStack() as stack:
        if job.args.lora_merge_rollout:
            with dry.of(WEIGHTS):
                stack.enter_context(merged(trained))
        yield


def dry_passes(job: Job, trained: Any, dry: DryRun) -> Mapping[str, Bytes]:
    """Bytes by cause at the peak of each phase, without weights, optimizer states and reference model. Under HOST are
    the bytes in host memory, under KEPT those that a rollout leaves behind. `trained` is the model without data, or the
    `peft.PeftModel` around it."""
    args, policy = job.args, policy_of(job, trained, dry)
    model, family = policy.model, policy.family
    prompts = prompts_of(job, family, model)
    pack, several = largest_pack(job, prompts[: args.prompts_per_device])
    draw: Callable[..., Bytes] = rollout if args.rollout_engine == "native" else generate
    found: dict[str, Bytes] = {}
    with vision_counted(family, model, dry), use(args.kernels if job.device == "cpu" else ""), dry:
        with merged_for_rollout(job, trained, dry):
            found[KEPT] = draw(job, policy, prompts, dry)
        found["rollout"] = dict(dry.at_peak)
        if job.reference != "none":
            dry.restart()
            with dry.of(ACTIVATIONS):
                policy.logprobs(pack)
            found["reference"] = dict(dry.at_peak)
        dry.restart()
        with dry.of(ACTIVATIONS):
            update(job, model, policy, pack, dry, several=several)
        found["policy"] = dict(dry.at_peak)
        found[HOST] = {ACTIVATIONS: dry.most_on_host}
    return found


def update(job: Job, model: Any, policy: PackedPolicy, pack: Any, dry: DryRun, *, several: bool) -> None:
    """Run forward and backward of one pack; with several, gradients of earlier packs exist already."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.train()
    if several:
        with dry.of(GRADIENTS):
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter, dtype=torch.float32)
    hooks = [p.register_post_accumulate_grad_hook(lambda p: dry.is_of(p.grad, GRADIENTS)) for p in parameters]
    width = model.config.get_text_config(decoder=True).hidden_size
    kept = checkpoints_on_host(dry, len(pack.input_ids), width) if job.offloads else nullcontext()
    with policy.attention():
        with kept:
            loss, _ = policy.loss(pack, Objective(GRPOSettings(beta=0.0), 1.0))
        loss.backward()
    for hook in hooks:
        hook.remove()
    for parameter in parameters:
        parameter.grad = None
