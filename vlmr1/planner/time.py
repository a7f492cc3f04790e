"""Predicted milliseconds of a step by phase: arithmetic on counted FLOPs and bytes, not a measurement.

The trainer's own passes run without data, and their kernels are counted (`work.py`). A kernel takes the largest of its
FLOPs, its bytes and its launch over the ceilings of a GPU (`cards.py`); one kernel runs after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from vlmr1.errors import SettingError
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models.attention import attending_by, autocast
from vlmr1.models.features import all_images, encode, unique_images
from vlmr1.models.optimizers import optimizer_of
from vlmr1.planner.cards import Card
from vlmr1.planner.cuda_ops import NAME, Prefill, Streaming
from vlmr1.planner.dry_run import LOGITS, VISION, kernel
from vlmr1.planner.job import Job, packs_of, prompts_of
from vlmr1.planner.passes import merged_for_rollout, policy_of, update
from vlmr1.planner.plan import model_without_data, trained_parameters
from vlmr1.planner.policy import vision_counted
from vlmr1.planner.work import Kernels, WorkRun
from vlmr1.rollout.kv_cache import head_dim_of
from vlmr1.rollout.sampling import sample_tokens
from vlmr1.types import Prompt
from vlmr1_kernels import PrefixLayout

PREFILL, DECODE, REFERENCE, OLD = "rollout: prefill", "rollout: decode", "reference", "old log-probs"
POLICY, TOWER, DECODER, HEAD = "policy", "policy: vision tower", "policy: decoder", "policy: head and loss"
OPTIMIZER = "optimizer"
PARTS = {VISION: TOWER, LOGITS: HEAD}  # of the policy pass, by cause; the rest is the decoder's
KINDS = ("product", "attention", "other")


@dataclass(frozen=True)
class Work:
    """Kernels of one generation and its updates by phase; of DECODE those of one step, at the mean length."""

    job: Job
    kernels: Mapping[str, Kernels]

    @property
    def steps(self) -> int:
        """Decode steps of a generation."""
        return self.job.args.max_completion_length - 1

    def milliseconds(self, card: Card) -> dict[str, dict[str, float]]:
        """Milliseconds by phase and kind of kernel."""
        args, found = self.job.args, {}
        for phase, kernels in self.kernels.items():
            graph = phase == DECODE and args.rollout_engine == "native" and args.cuda_graphs is not False
            times = dict.fromkeys(KINDS, 0.0)
            for each, count in kernels.items():
                times[each.kind] += 1e3 * count * card.seconds(each, graph=graph)
            steps = self.steps if phase == DECODE else 1
            found[phase] = {kind: steps * time for kind, time in times.items()}
        return found


def count_work(job: Job) -> Work:
    """Count the kernels of one generation and its updates, with every completion at its longest."""
    if job.device != "cuda":
        raise SettingError("time is predicted for GPUs: --device cpu has no ceilings")
    args, run = job.args, WorkRun()
    trained = model_without_data(job, run)
    policy = policy_of(job, trained, run)
    model, family = policy.model, policy.family
    prompts = prompts_of(job, family, model)
    updates = args.updates_per_generation * args.num_iterations
    packs = packs_of(job, prompts)
    shapes = [(pack.layout, len(pack.images)) for pack in packs]
    tower = attrgetter(family.vision_paths[0])(model)  # naive passes too have one call for all images of a layer
    with vision_counted(family, model, run), attending_by(NAME, tower), run:
        with merged_for_rollout(job, trained, run):
            (_rollout if args.rollout_engine == "native" else _generate)(job, policy, prompts, run)
        model.eval()
        for shape, pack in dict(zip(shapes, packs, strict=True)).items():
            run.repeats = shapes.count(shape)
            for phase, wanted in ((REFERENCE, job.reference != "none"), (OLD, _needs_old_logprobs(args))):
                if wanted:
                    with run.during(phase):
                        policy.logprobs(pack)
            run.repeats *= args.num_iterations
            with run.during(POLICY):
                update(job, model, policy, pack, run, several=True)
        run.repeats = updates
        with run.during(OPTIMIZER):
            _optimize(job, model)
    kernels: dict[str, Kernels] = {}
    for (phase, cause), counted in run.kernels.items():
        name = PARTS.get(cause, DECODER) if phase == POLICY else phase
        kernels[name] = kernels.get(name, Counter()) + counted
    return Work(job, kernels)


def _needs_old_logprobs(args: Any) -> bool:
    """Whether a generation has a pass for the log-probs of the old policy, as in `GRPOTrainer`."""
    needed = args.kl_in_reward or args.importance_sampling_correction != "none"
    return args.old_logprobs != "rollout" and (needed or args.updates_per_generation * args.num_iterations > 1)


@torch.no_grad()
def _rollout(job: Job, policy: PackedPolicy, prompts: list[Prompt], run: WorkRun) -> None:
    """Run the native engine's prefill of all prompts, and a decode step of all sequences at their mean length."""
    model, family, size = policy.model, policy.family, job.args.num_generations
    with autocast(model.device, policy.dtype):
        lengths = tuple(len(prompt.input_ids) for prompt in prompts)
        with run.during(PREFILL), policy.attention():
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
            tokens, places = _next_tokens(prompts, size)
            _sample(job, policy, family.hidden(model, tokens, places, [], shared=shared)[:, 0])


@torch.no_grad()
def _generate(job: Job, policy: PackedPolicy, prompts: list[Prompt], run: WorkRun) -> None:
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
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.empty(shape, dtype=policy.dtype or model.dtype) for _ in range(2)), layer)
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


def _optimize(job: Job, model: Any) -> None:
    """Note clipping, and one pass over gradients, weights and states; some optimizers make several."""
    optimizer, parameters = optimizer_of(job.args), trained_parameters(model)
    share = 1 / job.gpus if job.zero else 1
    gradients = 4 * share * sum(each.numbers for each in parameters)
    if job.args.max_grad_norm:
        kernel("norm", 0, gradients)
        kernel("mul_", 0, 2 * gradients)
    rest = sum(each.bytes + optimizer.state_bytes(each) for each in parameters)
    kernel("step", 0, gradients + 2 * share * rest)
