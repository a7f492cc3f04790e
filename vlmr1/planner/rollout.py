"""Dry runs of a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vlmr1.grpo.policy import PackedPolicy
from vlmr1.planner import cuda_ops
from vlmr1.planner.cuda_ops import Streaming
from vlmr1.planner.dry_run import ACTIVATIONS, DECODE_WEIGHTS, GRAPHS, HOST, KV, LOGITS, DryRun
from vlmr1.planner.job import Job
from vlmr1.rollout import NativeEngine
from vlmr1.rollout.decoder_weights import copied_bytes
from vlmr1.rollout.engine import Request
from vlmr1.rollout.kv_cache import BLOCK_SIZE, KVCache, block_bytes, num_blocks, rounded_up
from vlmr1.rollout.sampling import sample_tokens
from vlmr1.rollout.scheduler import Scheduler
from vlmr1.rollout.sequences import Batch, RunningGroup, RunningSequence
from vlmr1.types import Prompt

MIB = 2**20
COPIES = 5  # of all logits, in float32, that the transformers engine has at its end: logits, scores, and three of these


class _OnCuda(Scheduler):
    """A scheduler whose head keeps its weight in the compute dtype and writes float32, as on a GPU."""

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.new_empty(len(hidden), self.vocabulary, dtype=torch.float32)


def cache_blocks(job: Job, prompts: Sequence[Prompt], dtype: torch.dtype, engine: NativeEngine) -> tuple[int, bool]:
    """Number of KV blocks: enough for all groups, or what `rollout_kv_mib` allows; at least those of one group. And
    whether they are kept between generations."""
    args = job.args
    group = num_blocks(len(prompts[0].input_ids)) + args.num_generations * num_blocks(args.max_completion_length - 1)
    wanted, device_bytes = group * len(prompts), job.device_bytes if job.device == "cuda" else None
    each = block_bytes(job.config.get_text_config(decoder=True), dtype)
    kept = engine.keeps(wanted * each, device_bytes)
    wanted = rounded_up(wanted) if kept else wanted
    if args.rollout_kv_mib is not None:
        wanted = min(wanted, int(args.rollout_kv_mib * MIB) // each)
        kept = engine.keeps(wanted * each, device_bytes)
    return max(wanted, group), kept


@torch.no_grad()
def rollout(job: Job, policy: PackedPolicy, prompts: Sequence[Prompt], dry: DryRun) -> dict[str, int]:
    """Run the native engine's prefill, and one decoding step of all sequences at their full length. Return the bytes
    that are kept until the next rollout, by cause; under HOST what preempted groups have in host memory at most."""
    model, args = policy.model, job.args
    dtype = policy.dtype or model.dtype
    request = Request(prompts, args.num_generations, args.sampling(), 0)
    engine = NativeEngine(model, policy.family, None, dtype=policy.dtype, features=policy.features, ignore_eos=True)
    engine.cuda_graphs = args.cuda_graphs
    engine.keep_cache = False if args.lora_merge_rollout or job.shards_weights else args.rollout_keep_cache
    copied = copied_weights(job, policy, dtype)
    if copied is not None:
        engine.decode_forward = SimpleNamespace(fixed_addresses=True, copied_bytes=copied)
    blocks, kept = cache_blocks(job, prompts, dtype, engine)
    graphs = job.device == "cuda" and args.cuda_graphs is not False
    model.eval()
    options: dict[str, Any] = {"enabled": policy.dtype is not None, "cache_enabled": not copied}
    with torch.autocast(model.device.type, dtype=policy.dtype, **options):
        with dry.of(DECODE_WEIGHTS):
            copies = torch.empty((copied or 0) // 4)
        with dry.of(KV):
            state = engine.new_state(blocks)
            dry.is_of(state.suppressed_ids, LOGITS)
        with dry.of(DECODE_WEIGHTS):
            schedule = (_OnCuda if job.device == "cuda" else Scheduler)(engine, request, state, {}, graphs=graphs)
            if job.device == "cuda" and dtype.itemsize < 4:
                schedule.half_weight = state.head = schedule.head.weight.to(dtype)
        held = {KV: state.cache.data.nbytes, DECODE_WEIGHTS: dry.live[DECODE_WEIGHTS]}
        groups = schedule.admit()
        batch = _full_batch(schedule, groups)
        dry.restart()
        if graphs:
            before = dry.total
            _decode(policy, schedule, batch, dry)
            held[GRAPHS] = dry.peak - before
            with dry.of(GRAPHS):  # a step's memory is that of its graph, and cannot be used by a prefill
                pool = torch.empty(held[GRAPHS] // 4)
            dry.restart()
        _prefill(policy, schedule, groups, dry)
        if graphs:
            del pool
        else:
            _decode(policy, schedule, batch, dry)
    del copies
    if not engine.fixed_addresses:
        held.pop(GRAPHS, None)
    return (held if kept else {}) | {HOST: _preempted_bytes(state.cache, schedule)}


def _preempted_bytes(cache: KVCache, schedule: Scheduler) -> int:
    """Keys and values of all groups but one at their full length; 0 where the cache has room for all groups."""
    limit = schedule.limit
    group = num_blocks(limit.max_prefix) + limit.max_group * num_blocks(schedule.settings.max_completion_length - 1)
    blocks = cache.allocator.count
    return 0 if blocks >= group * limit.groups else group * (limit.groups - 1) * cache.data.nbytes // (blocks + 1)


def copied_weights(job: Job, policy: PackedPolicy, dtype: torch.dtype) -> int | None:
    """Bytes of the weights that the decode steps of a GPU copy; None where they run the stock forward."""
    args = job.args
    stock = args.fused_layers == "torch" or args.load_in_4bit or job.shards_weights
    if job.device != "cuda" or stock or (args.use_dora and not args.lora_merge_rollout):
        return None
    return copied_bytes(attrgetter(policy.family.decoder_path)(policy.model).layers, dtype)


def _prefill(policy: PackedPolicy, schedule: Scheduler, groups: Sequence[RunningGroup], dry: DryRun) -> None:
    """Run the prefill of these groups, and draw the first token of each sequence."""
    size = schedule.request.num_generations
    draws = torch.zeros(len(groups) * size, dtype=torch.float64)
    with dry.of(ACTIVATIONS), policy.attention():
        starts = [group.first_block * BLOCK_SIZE for group in groups]
        logits = schedule.prompt_logits([group.prompt for group in groups], starts)
    seen = None
    if schedule.settings.repetition_penalty != 1:
        seen = torch.zeros(len(draws), schedule.vocabulary, dtype=torch.bool)
    with dry.of(LOGITS):
        logits = logits.repeat_interleave(torch.full((len(groups),), size), 0, output_size=len(draws))
        _sample(schedule, logits, draws, seen)


def _full_batch(schedule: Scheduler, groups: Sequence[RunningGroup]) -> Batch:
    """A batch of all sequences of the groups at their full length, with the padding rows that a graph has."""
    length = max(1, schedule.settings.max_completion_length - 1)
    blocks = list(range(max(1, num_blocks(length))))
    size = schedule.request.num_generations
    schedule.running = [RunningSequence(p, g, [0] * length, blocks=blocks) for p in groups for g in range(size)]
    rows = schedule.padded(len(schedule.running))
    batch = schedule.new_batch(replace(schedule.limit, rows=rows, groups=len(groups)))
    batch.fill(schedule.running)
    return batch


def _decode(policy: PackedPolicy, schedule: Scheduler, batch: Batch, dry: DryRun) -> None:
    """Run the last decoding step of all sequences."""
    batch.attention.begin_step()
    shared: Any = Streaming() if isinstance(schedule, _OnCuda) else batch.attention
    positions = batch.positions.expand(batch.position_dims, -1)[..., None]  # [K, S, 1]
    draws = torch.zeros(batch.rows, dtype=torch.float64)
    with dry.of(ACTIVATIONS):
        hidden = policy.family.hidden(policy.model, batch.tokens[:, None], positions, [], shared=shared)
    with dry.of(LOGITS):
        _sample(schedule, schedule.logits(hidden[:, 0]), draws, batch.seen)


def _sample(schedule: Scheduler, logits: Tensor, draws: Tensor, seen: Tensor | None) -> None:
    sample = cuda_ops.sample_tokens if isinstance(schedule, _OnCuda) else sample_tokens
    sample(logits, schedule.suppressed_ids, schedule.settings, draws, seen)


@torch.no_grad()
def generate(job: Job, policy: PackedPolicy, prompts: Sequence[Prompt], dry: DryRun) -> dict[str, int]:
    """Run the transformers engine's forward over the repeated prompts, with its cache and the logits that it keeps
    until its end."""
    model, family, config = policy.model, policy.family, job.config.get_text_config(decoder=True)
    dtype, vocabulary = policy.dtype or model.dtype, len(family.head(model).weight)
    rows = [prompt for prompt in prompts for _ in range(job.args.num_generations)]
    ids = torch.stack([prompt.input_ids for prompt in rows])
    positions = torch.stack([prompt.positions for prompt in rows], 1)
    model.eval()
    dry.restart()
    with torch.autocast(model.device.type, dtype=policy.dtype, enabled=policy.dtype is not None):
        cached = len(rows) * (ids.shape[1] + job.args.max_completion_length) * block_bytes(config, dtype) // BLOCK_SIZE
        with dry.of(KV):
            kept = torch.empty(cached // dtype.itemsize, dtype=dtype)
        with dry.of(ACTIVATIONS):
            features = family.encode_images(model, [image for prompt in rows for image in prompt.images])
            family.hidden(model, ids, positions, features, attention_mask=torch.ones_like(ids))
        with dry.of(LOGITS):
            logits = torch.empty(COPIES, len(rows), job.args.max_completion_length, vocabulary)
    del kept, logits
    return {}
