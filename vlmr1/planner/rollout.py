"""Dry runs of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models.attention import autocast
from vlmr1.planner.cuda_ops import Streaming
from vlmr1.planner.dry_run import ACTIVATIONS, KV, LOGITS, DryRun
from vlmr1.planner.job import Job
from vlmr1.rollout import NativeEngine
from vlmr1.rollout.engine import Request
from vlmr1.rollout.kv_cache import BLOCK_SIZE, KVCache, block_bytes, num_blocks
from vlmr1.rollout.sampling import sample_tokens
from vlmr1.rollout.scheduler import Scheduler
from vlmr1.rollout.sequences import RunningGroup, RunningSequence
from vlmr1.types import Prompt

MIB = 2**20
COPIES = 5  # of all logits, in float32, that the transformers engine has at its end: logits, scores, and three of these


class _OnCuda(Scheduler):
    """A scheduler whose head keeps its weight in the compute dtype and writes float32, as on a GPU."""

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.new_empty(len(hidden), self.vocabulary, dtype=torch.float32)


def pool_blocks(job: Job, prompts: Sequence[Prompt], dtype: torch.dtype) -> int:
    """Number of KV blocks: enough for all groups, or what `rollout_kv_mib` allows; at least those of one group."""
    args = job.args
    group = num_blocks(len(prompts[0].input_ids)) + args.num_generations * num_blocks(args.max_completion_length - 1)
    wanted = group * len(prompts)
    if args.rollout_kv_mib is not None:
        each = block_bytes(job.config.get_text_config(decoder=True), dtype)
        wanted = min(wanted, int(args.rollout_kv_mib * MIB) // each)
    return max(wanted, group)


@torch.no_grad()
def rollout(job: Job, policy: PackedPolicy, prompts: Sequence[Prompt], dry: DryRun) -> None:
    """Run the native engine's prefill, and one decoding step of all sequences at their full length."""
    model, config, size = policy.model, job.config.get_text_config(decoder=True), job.args.num_generations
    dtype = policy.dtype or model.dtype
    settings = job.args.sampling()
    request = Request(prompts, size, settings, 0)
    engine = NativeEngine(model, policy.family, None, dtype=policy.dtype, features=policy.features, ignore_eos=True)
    model.eval()
    with autocast(model.device, policy.dtype):
        with dry.of(KV):
            pool = KVCache(config, pool_blocks(job, prompts, dtype), device=model.device, dtype=dtype)
        with dry.of(LOGITS):
            schedule = (_OnCuda if job.device == "cuda" else Scheduler)(engine, request, pool, {})
            if job.device == "cuda" and dtype.itemsize < 4:
                schedule.half_weight = schedule.head.weight.to(dtype, copy=True)
        dry.restart()
        flights = schedule.admit()
        with dry.of(ACTIVATIONS), policy.attention():
            logits = schedule.prompt_logits([f.prompt for f in flights], [f.first_block * BLOCK_SIZE for f in flights])
        draws = torch.zeros(len(flights) * size, dtype=torch.float64)
        seen = None
        if job.args.repetition_penalty != 1:
            seen = torch.zeros(len(draws), schedule.vocabulary, dtype=torch.bool)
        with dry.of(LOGITS):
            logits = logits.repeat_interleave(torch.full((len(flights),), size), 0, output_size=len(draws))
            sample_tokens(logits, schedule.suppressed_ids, settings, draws, seen)
        del logits, seen
        _decode(job, policy, schedule, flights, draws, dry)


def _decode(
    job: Job, policy: PackedPolicy, schedule: Scheduler, flights: Sequence[RunningGroup], draws: Tensor, dry: DryRun
) -> None:
    """Run the last decoding step of all sequences."""
    length = max(1, job.args.max_completion_length - 1)
    blocks = list(range(max(1, num_blocks(length))))
    size = job.args.num_generations
    schedule.running = [RunningSequence(f, g, [0] * length, blocks=blocks) for f in flights for g in range(size)]
    batch = schedule.new_batch(len(schedule.running), len(flights))
    batch.fill(schedule.running)
    batch.attention.begin_step()
    shared: Any = Streaming() if job.device == "cuda" else batch.attention
    positions = batch.positions.expand(batch.position_dims, -1)[..., None]  # [K, S, 1]
    with dry.of(ACTIVATIONS):
        hidden = policy.family.hidden(policy.model, batch.tokens[:, None], positions, [], shared=shared)
    with dry.of(LOGITS):
        sample_tokens(schedule.logits(hidden[:, 0]), schedule.suppressed_ids, schedule.settings, draws, batch.seen)


@torch.no_grad()
def generate(job: Job, policy: PackedPolicy, prompts: Sequence[Prompt], dry: DryRun) -> None:
    """Run the transformers engine's forward over the repeated prompts, with its cache and the logits that it keeps."""
    model, family, config = policy.model, policy.family, job.config.get_text_config(decoder=True)
    dtype, vocabulary = policy.dtype or model.dtype, len(family.head(model).weight)
    rows = [prompt for prompt in prompts for _ in range(job.args.num_generations)]
    ids = torch.stack([prompt.input_ids for prompt in rows])
    positions = torch.stack([prompt.positions for prompt in rows], 1)
    model.eval()
    dry.restart()
    with autocast(model.device, policy.dtype):
        cached = len(rows) * (ids.shape[1] + job.args.max_completion_length) * block_bytes(config, dtype) // BLOCK_SIZE
        with dry.of(KV):
            kept = torch.empty(cached // dtype.itemsize, dtype=dtype)
        with dry.of(ACTIVATIONS):
            features = family.encode_images(model, [image for prompt in rows for image in prompt.images])
            family.hidden(model, ids, positions, features, attention_mask=torch.ones_like(ids))
        with dry.of(LOGITS):
            logits = torch.empty(COPIES, len(rows), job.args.max_completion_length, vocabulary)
    del kept, logits
