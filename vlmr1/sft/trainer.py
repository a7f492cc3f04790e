"""Supervised fine-tuning: one `training_step` is one update on the answers of a batch of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from vlmr1.data.prompts import PromptDataset
from vlmr1.distributed.metrics import over_ranks
from vlmr1.grpo.pack_trainer import PackTrainer
from vlmr1.sft.answers import AnswerDataset
from vlmr1.sft.loss import CrossEntropy
from vlmr1.types import Group, Sample, StepMetrics


class SFTTrainer(PackTrainer):
    """Cross-entropy of given answers; the answers of a row share its image and prompt."""

    def __init__(
        self,
        model: Any,
        args: Any,
        samples: Sequence[Sample],
        processor: Any,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
        eval_dataset: Any = None,
    ):
        super().__init__(model, args, samples, processor, callbacks, optimizers, eval_dataset)

    def make_dataset(self, samples: Sequence[Sample], args: Any) -> AnswerDataset:
        prompts: PromptDataset = super().make_dataset(samples, args)
        return AnswerDataset(prompts.samples, prompts.builder, args.max_length)

    def _step(self, model: Any, items: Sequence[Group]) -> Tensor:
        (groups,) = self.balance(items)
        loss, metrics = self.backward(model, groups)
        if self.features is not None:
            self.features.clear()
        self.pending.steps.append(StepMetrics(metrics | self._metrics(groups), self.phases.seconds, self.phases.memory))
        self.last_loss = float(loss)
        return loss

    def backward(self, model: Any, groups: Sequence[Group]) -> tuple[Tensor, dict[str, float]]:
        """Accumulate the gradient of the update's loss, the mean over its answer tokens on all ranks; returns the loss
        and metrics."""
        tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
        return self.pass_over(model, groups, CrossEntropy(self.ranks.all_reduce_sum(float(tokens))))

    def _metrics(self, groups: Sequence[Group]) -> dict[str, float]:
        """Metrics of an update's answers, of all ranks."""
        lengths = [len(c.token_ids) for group in groups for c in group.completions]
        cut = [c.finish_reason == "length" for group in groups for c in group.completions]
        seen = sum(len(group.prompt.input_ids) * len(group.completions) for group in groups) + sum(lengths)
        self.state.num_input_tokens_seen += int(self.ranks.all_reduce_sum(float(seen)))
        own = {
            "completion_length": sum(lengths) / len(lengths),
            "completion_length_max": float(max(lengths)),
            "truncated": sum(cut) / len(cut),
            "num_tokens": float(self.state.num_input_tokens_seen),
        }
        return over_ranks(own | self.runner.counts, len(lengths), self.ranks)
