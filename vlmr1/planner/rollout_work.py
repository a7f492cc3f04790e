"""The kernels of a rollout: its prefill, and one decode step at the mean length, without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models.attention import autocast
from vlmr1.models.features import all_images, encode, unique_images
from vlmr1.planner.cuda_ops import Prefill, Streaming, sample_tokens
from vlmr1.planner.decode_work import fused_step
from vlmr1.planner.dry_run import kernel
from vlmr1.planner.job import Job
from vlmr1.planner.rollout import copied_weights
from vlmr1.planner.work import UNCOUNTED, WorkRun
from vlmr1.rollout.kv_cache import head_dim_of
from vlmr1.types import Prompt
from vlmr1_kernels import PrefixLayout

PREFILL, DECODE = "rollout: prefill", "rollout: decode"


@torch.no_grad()
def native(job: Job, policy: PackedPolicy, prompts: list[Prompt], run: WorkRun) -> None:
    """Run the native engine's prefill of all prompts, and a decode step of all sequences at their mean length."""
    model, family, size = policy.model, policy.family, job.args.num_generations
    copied = copied_weights(job, policy, policy.dtype or model.dtype)
    with autocast(model.device, policy.dtype):
        lengths = tuple(len(prompt.input_ids) for prompt in prompts)
        with run.during(PREFILL), policy.attention():
            if copied:
                kernel("_foreach_copy_", 0, 3 * copied)
            images, refs, image_ids = unique_images(prompts)
            features = encode(family, model, refs, images, policy.features)
            ids, positions = (torch.cat([getattr(p, n) for p in prompts], -1) for n in ("input_ids", "positions"))
            shared: Any = Prefill(PrefixLayout(lengths, ((),) * len(lengths)))
            found = [features[i] for i in image_ids]
            hidden = family.hidden(model, ids[None], positions[:, None], found, shared=shared)
            _sample(job, policy, hidden[0, : len(prompts)].repeat_interleave(size, 0, output_size=size * len(prompts)))
        with run.during(DECODE), policy.attention():
            prefixes, suffixes = sum(lengths), len(prompts) * size * (job.args.max_completion_length // 2)
            shared = Streaming(prefixes + suffixes, size * prefixes + suffixes)
            if copied is not None:
                _sample(job, policy, fused_step(policy, len(prompts) * size, shared))
            else:
                tokens, places = _next_tokens(prompts, size)
                _sample(job, policy, family.hidden(model, tokens, places, [], shared=shared)[:, 0])


@torch.no_grad()
def generate(job: Job, policy: PackedPolicy, prompts: list[Prompt], run: WorkRun) -> None:
    """Run the forward of `generate` over the repeated prompts, and one with a cache of the mean length."""
    model, family, size = policy.model, policy.family, job.args.num_generations
    rows = [prompt for prompt in prompts for _ in range(size)]
    config = job.config.get_text_config(decoder=True)
    with autocast(model.device, policy.dtype):
        ids, positions = torch.stack([p.input_ids for p in rows]), torch.stack([p.positions for p in rows], 1)
        with run.during(PREFILL):
            images, _, image_ids = all_images(rows)
            features = family.encode_images(model, images)
            found = [features[i] for i in image_ids]
            hidden = family.hidden(model, ids, positions, found, attention_mask=torch.ones_like(ids))
            _sample(job, policy, hidden[:, -1])
        length = ids.shape[1] + job.args.max_completion_length // 2
        shape = len(rows), config.num_key_value_heads, length, head_dim_of(config)
        cache = DynamicCache()
        with run.during(UNCOUNTED):
            for layer in range(config.num_hidden_layers):
                keys, values = (torch.empty(shape, dtype=policy.dtype or model.dtype) for _ in range(2))
                cache.update(keys, values, layer)
        tokens, places = _next_tokens(prompts, size)
        mask = torch.ones(len(rows), length + 1, dtype=torch.long)
        with run.during(DECODE):
            inputs = {"input_ids": tokens, "position_ids": places, "attention_mask": mask}
            hidden = model.model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
            _sample(job, policy, hidden[:, -1])


def _next_tokens(prompts: list[Prompt], size: int) -> tuple[Tensor, Tensor]:
    """[S, 1] token ids and [K, S, 1] positions of a decode step."""
    rows = size * len(prompts)
    return torch.zeros(rows, 1, dtype=torch.long), torch.ones(len(prompts[0].positions), rows, 1, dtype=torch.long)


def _sample(job: Job, policy: PackedPolicy, hidden: Tensor) -> None:
    """Project hidden states [S, D] to float32 logits and draw a token of each."""
    weight, size = policy.family.head(policy.model).weight, (policy.dtype or hidden.dtype).itemsize
    moved = size * (hidden.numel() + weight.numel()) + 4 * len(hidden) * len(weight)
    kernel("mm", 2 * len(hidden) * weight.numel(), moved)
    logits = torch.empty(len(hidden), len(weight), dtype=torch.float32)
    seen = None
    if job.args.repetition_penalty != 1:
        seen = torch.zeros(logits.shape, dtype=torch.bool)
    draws, suppressed = torch.zeros(len(hidden), dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    sample_tokens(logits, suppressed, job.args.sampling(), draws, seen)
