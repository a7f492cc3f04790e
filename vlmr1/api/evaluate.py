"""Evaluation as TRL does it: completions are drawn as in training, scored, and their loss is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from vlmr1.api.metrics import NOT_CLIPPED, Facts, clip_ratios, metrics_of
from vlmr1.distributed.metrics import all_losses
from vlmr1.evaluation.during_training import untouched
from vlmr1.grpo.advantages import with_advantages
from vlmr1.grpo.loss import Objective, normalizer
from vlmr1.grpo.pack_budget import catch_oom
from vlmr1.grpo.policy import call
from vlmr1.telemetry.phases import Phases
from vlmr1.types import Group, Pack, Sample
from vlmr1_kernels import use

ROUND = 1 << 20  # of the first batch; rounds of training have smaller numbers, so that the draws differ


def evaluate(trainer: Any, samples: Sequence[Sample], prefix: str) -> dict[str, float]:
    """Return metrics by name, each with the prefix. Random states and the logs of training are unchanged."""
    clock, phases = perf_counter(), trainer.phases
    metrics, trainer.reward_context.metrics = trainer.reward_context.metrics, {}
    trainer.phases = Phases()
    features, kept = trainer.features, {}
    if features is not None:  # of the images of training
        kept, features.kept = features.kept, {}
    try:
        with untouched(), use(trainer.args.kernels):
            groups = _scored(trainer, samples)
            values = _losses(trainer, groups)
        names = [reward.name for reward in trainer.rewards]
        values |= metrics_of(Facts.of(groups, trainer.ranks), names, trainer.reward_weights)
        values |= trainer.reward_context.take()
    finally:
        trainer.phases, trainer.reward_context.metrics = phases, metrics
        if features is not None:
            features.kept = kept
    seconds, (_, _, batches) = perf_counter() - clock, _batches(trainer, len(samples))
    values |= clip_ratios(NOT_CLIPPED, trainer.args.loss_type)
    values |= {"num_tokens": float(trainer.state.num_input_tokens_seen), "runtime": seconds}
    values |= {"samples_per_second": len(samples) / seconds, "steps_per_second": batches / seconds}
    return {f"{prefix}_{name}": value for name, value in values.items()}


def _batches(trainer: Any, rows: int) -> tuple[int, int, int]:
    """Completions of a row, rows of a batch, and batches."""
    args, ranks = trainer.args, trainer.ranks
    count = args.num_generations_eval or args.num_generations
    size = max(1, args.per_device_eval_batch_size // count)
    return count, size, -(-rows // (size * ranks.world_size))


def _scored(trainer: Any, samples: Sequence[Sample]) -> list[Group]:
    """Groups of this rank's rows, in batches of per_device_eval_batch_size completions."""
    ranks, (count, size, rounds) = trainer.ranks, _batches(trainer, len(samples))
    builder: Any = trainer.train_dataset.builder
    groups: list[Group] = []
    for number in range(rounds):
        start = (number * ranks.world_size + ranks.rank) * size
        rows = range(start, min(start + size, len(samples)))
        if number == rounds - 1 and not rows and not groups:
            rows = range(1)  # every rank needs a group: the first row counts twice
        prompts = [builder(samples[row]) for row in rows]
        groups += trainer.score(trainer.rollout(prompts, ROUND + number, count))
        _forget_images(trainer)
    return groups


def _forget_images(trainer: Any) -> None:
    """Drop the features of images, which would add up over all rows. Those of a sharded tower are kept: without them,
    ranks whose packs have other images would call it at other times."""
    if trainer.features is not None and trainer.sharding is None:
        trainer.features.clear()


def _losses(trainer: Any, groups: Sequence[Group]) -> dict[str, float]:
    """The loss of the present policy, without the entropy bonus, its entropy, and its KL to the reference."""
    args, ranks, policy, model = trainer.args, trainer.ranks, trainer.policy, trainer.model
    options = {"aggregation": args.multi_objective_aggregation}
    groups = with_advantages(groups, trainer.reward_weights, str(args.scale_rewards), ranks, **options)

    def reference(pack: Pack) -> Tensor:
        values = trainer.reference.logprobs(pack)
        _forget_images(trainer)
        return values

    if trainer.reference is not None:
        with trainer.reference.ready():
            trainer.runner.map(groups, reference, into="ref_logp", every=True)
    count = normalizer(groups, trainer.settings, mask_truncated=args.mask_truncated_completions)
    objective = Objective(replace(trainer.settings, entropy_coef=0.0), max(ranks.all_reduce_sum(count), 1.0))

    def loss(pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad(), policy.attention():
            value, metrics = call(model, policy.model, lambda: policy.loss(pack, objective))
        _forget_images(trainer)
        return value * pack.weight, metrics if pack.weight else metrics | {"dropped_rows": metrics["tokens"]}

    training = model.training
    model.eval()
    passes = trainer.runner.retry_smaller(lambda: [catch_oom(each, loss) for each in trainer.runner.packs(groups)])
    model.train(training)
    total = torch.stack([value for value, _ in passes]).sum()
    tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    value, metrics = all_losses(total, tokens, [each for _, each in passes], ranks)
    names = ["entropy"] if trainer.reference is None else ["entropy", "kl"]
    return {"loss": float(value)} | {name: metrics[name] for name in names}
