"""Evaluation during supervised fine-tuning: loss, entropy and token accuracy of held-out answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmr1.distributed.metrics import combine
from vlmr1.evaluation.callback import PeriodicEvaluation
from vlmr1.grpo.policy import call
from vlmr1.sft.answers import AnswerDataset
from vlmr1.sft.loss import CrossEntropy
from vlmr1.types import Pack, Sample
from vlmr1_kernels import use


class LossEvaluation(PeriodicEvaluation):
    """Evaluate the loss of rows every `eval_steps` updates."""

    def measure(self, stopped: Callable[[], bool]) -> dict[str, float] | None:
        return evaluate_loss(self.trainer, self.samples, stopped)


def evaluate_loss(
    trainer: Any, samples: Sequence[Sample], stopped: Callable[[], bool] = lambda: False, batch: int | None = None
) -> dict[str, float] | None:
    """Return `eval/loss`, the mean over all answer tokens of the samples, `eval/entropy` and
    `eval/mean_token_accuracy`; None where `stopped()`, called before each batch, is true. A batch has as many rows of a
    rank as an update, or `batch`."""
    builder = trainer.train_dataset.builder
    groups_of = AnswerDataset(samples, builder, trainer.args.max_length)
    size, ranks, was_training = batch or trainer.args.prompts_per_device, trainer.ranks, trainer.model.training
    objective = CrossEntropy(1.0)
    parts: list[dict[str, Tensor]] = []

    def measure(pack: Pack) -> dict[str, Tensor]:
        with torch.no_grad(), trainer.policy.attention():
            loss, metrics = call(trainer.model, trainer.policy.model, lambda: trainer.policy.loss(pack, objective))
        found = metrics | {"loss": loss / metrics["tokens"]}
        return {name: value.cpu() for name, value in found.items() if name != "logp" and pack.weight}

    trainer.model.eval()
    with use(trainer.args.kernels):
        for start in range(0, len(samples), size * ranks.world_size):
            if stopped():
                trainer.model.train(was_training)
                return None
            own = range(start + ranks.rank, min(start + size * ranks.world_size, len(samples)), ranks.world_size)
            # A rank without a row runs the passes of the others on the first one, without weight.
            groups = [groups_of[place] for place in own]
            pad = groups or [groups_of[start]]
            trainer.runner.encode_ahead(trainer.model, pad)
            parts += [found for found in trainer.runner.run(groups, measure, pad=pad) if found]
            if trainer.features is not None:
                trainer.features.clear()
    trainer.model.train(was_training)
    every = [part for own in ranks.all_gather(parts) for part in own]
    values = combine(every, tokens=int(sum(part["tokens"] for part in every)))
    return {f"eval/{name}": values[name] for name in ("loss", "mean_token_accuracy", "entropy") if name in values}
