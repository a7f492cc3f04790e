"""Greedy evaluation of a trainer's present weights by the run's own rewards; random states and training unchanged."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmr1.data.box_coordinates import Setting
from vlmr1.distributed.sharded import summon_full_params
from vlmr1.evaluation.decode import Decoder
from vlmr1.evaluation.records import Record
from vlmr1.evaluation.run_rows import kind_of_boxes
from vlmr1.evaluation.tasks import box_metrics
from vlmr1.grpo.setup import make_engine
from vlmr1.rewards.groups import score_groups
from vlmr1.rewards.settings import RewardSettings
from vlmr1.types import Sample
from vlmr1_kernels import use

if TYPE_CHECKING:
    from vlmr1.grpo.trainer import GRPOTrainer


def evaluate_during_training(
    trainer: GRPOTrainer,
    samples: Sequence[Sample],
    decoder: Decoder | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Decode one greedy completion for each sample and return metrics by name.

    They are `eval/rewards/NAME/mean` for each reward of the run, `eval/reward` with their weights, lengths, and
    `eval/rec/...` or `eval/ovd/...` where `accuracy` scores all rows by IoU or by labelled boxes. The model's mode
    and all random states are unchanged. Return None where `stopped()`, called before each batch, is true."""
    decoder = decoder or decoder_of(trainer)
    size = trainer.args.prompts_per_device * trainer.args.num_generations  # as many as in a rollout
    ranks = trainer.ranks
    trainer.engine.free_cache()  # the decoder's engine makes a cache, and copies of weights, of its own
    scored: list[tuple[int, list[float], Record]] = []  # row, rewards, what was decoded
    with untouched(), use(trainer.args.kernels), summon_full_params(trainer.model, trainer.sharding):
        for start in range(ranks.rank * size, len(samples), ranks.world_size * size):
            if stopped():
                return None
            drawn = decoder.groups(samples[start : start + size])
            working = trainer.working_rewards
            groups = score_groups(drawn, trainer.rewards, pool=trainer.reward_pool, working=working)
            for i, group in enumerate(groups):
                assert group.rewards is not None
                scored.append((start + i, group.rewards[0].tolist(), decoder.record(drawn[i], start + i)))
    rows = sorted((row for own in ranks.all_gather(scored) for row in own), key=lambda row: row[0])
    rewards = torch.tensor([values for _, values, _ in rows], dtype=torch.float64)  # [rows, R]
    records = [record for _, _, record in rows]
    means = rewards.nanmean(0).tolist()
    values = {f"eval/rewards/{reward.name}/mean": mean for reward, mean in zip(trainer.rewards, means, strict=True)}
    weights = trainer.args.reward_weights or [1.0] * len(means)
    values["eval/reward"] = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    values |= _box_metrics(trainer, samples, records)
    values["eval/completion_length"] = sum(len(record.token_ids) for record in records) / len(records)
    values["eval/truncated"] = sum(record.finish_reason == "length" for record in records) / len(records)
    return {name: value for name, value in values.items() if not math.isnan(value)}


def decoder_of(trainer: GRPOTrainer, box_coordinates: Setting = "auto") -> Decoder:
    """Return a decoder of the trainer's model and settings; its own engine leaves the run's statistics alone."""
    model = trainer.engine.model
    decoder = Decoder(
        model,
        trainer.processor,
        max_completion_length=trainer.args.max_completion_length,
        box_coordinates=box_coordinates,
        with_boxes=any(settings.mode == "strict" for settings in accuracy_of(trainer)),
        engine=make_engine(trainer, model),
    )
    decoder.sampling = replace(trainer.sampling, greedy=True)  # with the run's stop strings and penalty
    decoder.builder.template_kwargs = dict(trainer.args.chat_template_kwargs or {})
    return decoder


def accuracy_of(trainer: GRPOTrainer) -> list[RewardSettings]:
    """Return the settings of the run's accuracy reward; [] without one."""
    return [reward.settings for reward in trainer.rewards if reward.name == "accuracy" and reward.settings is not None]


def _box_metrics(trainer: GRPOTrainer, samples: Sequence[Sample], records: Sequence[Record]) -> dict[str, float]:
    """Metrics of rec or ovd where the accuracy reward of every row is of that kind and every row has one image."""
    kind = next((kind_of_boxes(samples, settings) for settings in accuracy_of(trainer)), None)
    return {f"eval/{kind}/{name}": value for name, value in box_metrics(kind, samples, records).items()} if kind else {}


@contextmanager
def untouched() -> Iterator[None]:
    """Restore all random states at the end of the block."""
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
