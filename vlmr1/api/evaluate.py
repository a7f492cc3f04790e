"""Evaluation as TRL does it: completions are drawn as in training, scored, and their loss is computed."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from vlmr1.api.metrics import Facts, metrics_of
from vlmr1.evaluation.during_training import untouched
from vlmr1.grpo.advantages import with_advantages
from vlmr1.grpo.loss import Objective, normalizer
from vlmr1.telemetry.phases import Phases
from vlmr1.types import Group, Sample
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
            loss, kl = _loss(trainer, groups)
        values = {"loss": loss} | metrics_of(
            Facts.of(groups, trainer.ranks), [reward.name for reward in trainer.rewards], trainer.reward_weights
        )
        values |= kl | trainer.reward_context.take()
    finally:
        trainer.phases, trainer.reward_context.metrics = phases, metrics
        if features is not None:
            features.kept = kept
    seconds = perf_counter() - clock
    values |= {"runtime": seconds, "samples_per_second": len(samples) / seconds}
    return {f"{prefix}_{name}": value for name, value in values.items()}


def _scored(trainer: Any, samples: Sequence[Sample]) -> list[Group]:
    """Groups of this rank's rows, in batches of per_device_eval_batch_size completions."""
    args, ranks = trainer.args, trainer.ranks
    count = args.num_generations_eval or args.num_generations
    size = max(1, args.per_device_eval_batch_size // count)
    rounds = -(-len(samples) // (size * ranks.world_size))
    builder: Any = trainer.train_dataset.builder
    groups: list[Group] = []
    for number in range(rounds):
        start = (number * ranks.world_size + ranks.rank) * size
        rows = range(start, min(start + size, len(samples)))
        if number == rounds - 1 and not rows and not groups:
            rows = range(1)  # every rank needs a group: the first row counts twice
        prompts = [builder(samples[row]) for row in rows]
        groups += trainer.score(trainer.rollout(prompts, ROUND + number, count))
    return groups


def _loss(trainer: Any, groups: Sequence[Group]) -> tuple[float, dict[str, float]]:
    """The loss of the present policy, without the entropy bonus, and its KL to the reference."""
    args, ranks = trainer.args, trainer.ranks
    options = {"aggregation": args.multi_objective_aggregation}
    groups = with_advantages(groups, trainer.reward_weights, str(args.scale_rewards), ranks, **options)
    model = trainer.model
    training = model.training
    trainer.runner.map(groups, lambda pack: trainer._policy_logprobs(model, pack), into="old_logp", every=True)
    if trainer.reference is not None:
        with trainer.reference.ready():
            trainer.runner.map(groups, trainer.reference.logprobs, into="ref_logp", every=True)
    model.train(training)
    count = normalizer(groups, trainer.settings, mask_truncated=args.mask_truncated_completions)
    objective = Objective(trainer.settings, max(ranks.all_reduce_sum(count), 1.0))
    total, divergence, tokens = 0.0, 0.0, 0
    for pack in trainer.runner.packs(groups):
        assert pack.old_logp is not None
        with torch.no_grad():
            loss, metrics = objective.from_logprobs(pack.old_logp, pack)
        total += float(loss) * pack.weight
        divergence += float(metrics["kl"]) * len(pack.targets)
        tokens += len(pack.targets)
    total, divergence, tokens = (ranks.all_reduce_sum(each) for each in (total, divergence, float(tokens)))
    return total, {} if trainer.reference is None else {"kl": divergence / max(tokens, 1.0)}
