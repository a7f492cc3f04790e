"""TRL's GRPOTrainer: its arguments, methods and metrics on `vlmr1.grpo.trainer.GRPOTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import set_seed

from vlmr1.api import parts
from vlmr1.api.config import GRPOConfig
from vlmr1.api.evaluate import evaluate
from vlmr1.api.metrics import Facts, clip_ratios, metrics_of
from vlmr1.api.refused import ARGUMENTS, refuse_arguments
from vlmr1.api.rows import samples_of
from vlmr1.api.script_trainer import ScriptTrainer, progress_of
from vlmr1.grpo.loss import clipped_shares
from vlmr1.grpo.trainer import GRPOTrainer as CoreTrainer
from vlmr1.types import Group, Pack, Sample


class GRPOTrainer(ScriptTrainer, CoreTrainer):
    """GRPO on a vision-language model, with the arguments of TRL."""

    args: GRPOConfig
    tag = "grpo"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ):
        refuse_arguments(locals(), GRPOConfig, ARGUMENTS)
        args = parts.default_config(model) if args is None else args
        set_seed(args.seed)  # before an adapter's first weights
        model = parts.load(model, peft_config, quantization_config, args)
        samples = samples_of(train_dataset, "train_dataset", parts.needed_rows(args))
        self.prompt_tokens = 0
        self.progress = progress_of(args)
        super().__init__(
            model,
            args,
            samples,
            parts.processor_of(processing_class, model, args),
            parts.rewards_of(reward_funcs, reward_processing_classes),
            callbacks=[*(callbacks or []), self.progress],
            optimizers=optimizers,
            eval_dataset=eval_dataset,
        )
        for reward in self.rewards:
            if reward.check is not None:  # as `vlmr1 train` checks every row
                reward.check(samples[0])
        self.progress.trainer = self

    # Evaluation

    def eval_samples(self, rows: Any, name: str = "eval_dataset") -> Sequence[Sample]:
        return samples_of(rows, name)

    def measure(self, samples: Sequence[Sample], prefix: str) -> dict[str, float]:
        """Draw completions for each row and score them."""
        return evaluate(self, samples, prefix)

    # Metrics

    def pass_metrics(self, logp: Tensor, pack: Pack) -> dict[str, Tensor]:
        return super().pass_metrics(logp, pack) | clipped_shares(logp, pack, self.settings)

    def backward(self, model: Any, groups: Sequence[Group]) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = super().backward(model, groups)
        metrics |= clip_ratios(metrics, self.args.loss_type)
        if self.args.entropy_coef:
            bonus = self.args.entropy_coef * metrics["entropy"]
            metrics |= {"entropy_coef": self.args.entropy_coef, "policy_loss": float(loss) + bonus}
        return loss, metrics

    def _metrics(self, minibatch: Any, *, drawn: bool) -> dict[str, float]:
        """The metrics of the core, and those of TRL, which take the place of others of the same name."""
        facts = Facts.of(minibatch.groups, self.ranks)
        if self.buffer.used <= len(self.buffer.minibatches):  # not in further iterations
            self.state.num_input_tokens_seen += facts.tokens
        own = metrics_of(facts, [reward.name for reward in self.rewards], self.reward_weights)
        own["num_tokens"] = float(self.state.num_input_tokens_seen)
        return super()._metrics(minibatch, drawn=drawn) | own
