"""TRL's GRPOTrainer: its arguments, methods and metrics on `vlmr1.grpo.trainer.GRPOTrainer`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import set_seed
from transformers.trainer_utils import TrainOutput

from vlmr1.api import parts
from vlmr1.api.config import GRPOConfig
from vlmr1.api.evaluate import evaluate
from vlmr1.api.metrics import Facts, clip_ratios, metrics_of
from vlmr1.api.refused import refused_arguments
from vlmr1.api.rows import samples_of
from vlmr1.api.runs import checkpoint_of, is_done, present_checkpoint, push, write_report
from vlmr1.errors import SettingError
from vlmr1.grpo.loss import clipped_shares
from vlmr1.grpo.trainer import GRPOTrainer as CoreTrainer
from vlmr1.report.progress import Progress
from vlmr1.types import Group, Pack


class GRPOTrainer(CoreTrainer):
    """GRPO on a vision-language model, with the arguments of TRL."""

    args: GRPOConfig

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
        _refuse(locals())
        args = parts.default_config(model) if args is None else args
        set_seed(args.seed)  # before an adapter's first weights
        model = parts.load(model, peft_config, args)
        samples = samples_of(train_dataset, "train_dataset", parts.needed_rows(args))
        self.prompt_tokens = 0
        self.progress = Progress(Path(args.output_dir or "."), console=not args.disable_tqdm)
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
        self.progress.trainer = self
        for reward in self.rewards:
            if reward.check is not None:  # as `vlmr1 train` checks every row
                reward.check(samples[0])

    # Runs

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """Train to the end, from the last complete checkpoint of output_dir with `resume_from_checkpoint=True`."""
        checkpoint = checkpoint_of(self, resume_from_checkpoint)
        if checkpoint is not None and is_done(self, checkpoint):
            return TrainOutput(self.state.global_step, 0.0, {})
        with self.progress:
            return super().train(resume_from_checkpoint=checkpoint, **options)

    def report(self, path: str | Path | None = None) -> Path:
        """Write the HTML report of the run, and return its path; by default training.html in output_dir."""
        return write_report(self, path)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Draw completions for each row, score them, log the metrics and return them."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise SettingError("eval_dataset is missing: give it to the trainer or to evaluate")
        found: dict[str, float] = {}
        for name, rows in parts.eval_sets(data).items():
            name = name.replace("eval", metric_key_prefix, 1)
            own = evaluate(self, samples_of(rows, "eval_dataset"), name)
            self.log(dict(own))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, own)
            found |= own
        return found

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        return self.evaluate()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Return whether this evaluation is the best. The library would note the directory in which a checkpoint is
        staged."""
        best = super()._determine_best_metric(metrics, trial)
        if best:
            self.state.best_global_step = None
            self.state.best_model_checkpoint = present_checkpoint(self)
        return best

    # Metrics

    def pass_metrics(self, logp: Tensor, pack: Pack) -> dict[str, Tensor]:
        return super().pass_metrics(logp, pack) | clipped_shares(logp, pack, self.settings)

    def backward(self, model: Any, groups: Sequence[Group]) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = super().backward(model, groups)
        return loss, metrics | (clip_ratios(metrics) if self.args.loss_type != "cispo" else {})

    def _metrics(self, minibatch: Any, *, drawn: bool) -> dict[str, float]:
        """The metrics of the core, and those of TRL, which take the place of others of the same name."""
        facts = Facts.of(minibatch.groups, self.ranks)
        if self.buffer.used <= len(self.buffer.minibatches):  # not in further iterations
            self.state.num_input_tokens_seen += facts.tokens
        own = metrics_of(facts, [reward.name for reward in self.rewards], self.reward_weights)
        own["num_tokens"] = float(self.state.num_input_tokens_seen)
        return super()._metrics(minibatch, drawn=drawn) | own

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.pending.steps and "loss" in logs:
            steps = self.pending.steps
            logs["step_time"] = sum(sum(step.seconds.values()) for step in steps) / len(steps)
        super().log(logs, start_time)

    # Models

    def create_model_card(
        self, model_name: Any = None, dataset_name: Any = None, tags: Any = None, **more: Any
    ) -> None:
        """Write README.md into output_dir."""
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        known = {"dataset": dataset_name} if dataset_name is not None else {}
        super().create_model_card(model_name=model_name, tags=[*tags, "grpo", "vlmr1"], **known, **more)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **card: Any,
    ) -> str | None:
        """Upload the model and its card, which are left in output_dir; return the repository's address (first rank).
        `card` are arguments of `create_model_card`."""
        if token is not None:
            raise SettingError("push_to_hub: token: use `hf auth login`, or set the variable HF_TOKEN")
        self.args.hub_revision = revision or self.args.hub_revision
        return push(self, commit_message, card)


def _refuse(given: dict[str, Any]) -> None:
    faults = list(refused_arguments(given))
    if faults:
        raise SettingError("\n".join(faults))
