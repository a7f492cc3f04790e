"""Base of the trainers of scripts, with the methods of TRL: train, evaluate, report and push."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PredictionOutput, TrainOutput

from vlmr1.api import parts
from vlmr1.api.runs import CARD, add_tags, checkpoint_of, is_done, model_name, present_checkpoint, push, write_report
from vlmr1.errors import SettingError
from vlmr1.report.progress import Progress
from vlmr1.training.hf_trainer import HFTrainer
from vlmr1.types import Sample


def progress_of(args: Any) -> Progress:
    """The logs of a run, and what is shown of it."""
    return Progress(Path(args.output_dir or "."), console=not args.disable_tqdm)


class ScriptTrainer(HFTrainer):
    """The methods that all trainers of TRL have. A subclass converts the rows of an evaluation, and measures them."""

    progress: Progress
    tag: str  # of model cards

    def __init__(self, *given: Any, **options: Any):
        super().__init__(*given, **options)  # type: ignore[reportCallIssue]  # of the trainer that this is a base of
        self.processing_class = self.callback_handler.processing_class = self.processor  # the core has its tokenizer

    def eval_samples(self, rows: Any, name: str = "eval_dataset") -> Sequence[Sample]:
        raise NotImplementedError

    def measure(self, samples: Sequence[Sample], prefix: str) -> dict[str, float]:
        raise NotImplementedError

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
        """Evaluate each data set, log the metrics and return them."""
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if data is None:
            raise SettingError("eval_dataset is missing: give it to the trainer or to evaluate")
        found: dict[str, float] = {}
        for name, rows in parts.eval_sets(data).items():
            name = name.replace("eval", metric_key_prefix, 1)
            own = self.measure(self.eval_samples(rows), name)
            self.log(own)  # which adds the epoch
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, own)
            found |= own
        return found

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Evaluate, without a line in the logs."""
        metrics = self.measure(self.eval_samples(parts.finite(test_dataset), "test_dataset"), metric_key_prefix)
        return PredictionOutput(predictions=None, label_ids=None, metrics=metrics)  # type: ignore[reportArgumentType]

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean time of a step; at the end of a run also the metrics of the steps since the last log."""
        steps, ends = self.pending.steps, "train_runtime" in logs
        if steps and ("loss" in logs or ends):
            logs["step_time"] = sum(sum(step.seconds.values()) for step in steps) / len(steps)
        if steps and ends:
            self.add_metrics(logs)
        super().log(logs, start_time)

    # Models

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint, and beside the first one of a run the model card."""
        if not (Path(self.args.output_dir or ".") / CARD).exists():
            self.create_model_card(model_name=model_name(self))
        super()._save_checkpoint(model, trial)

    def create_model_card(
        self, model_name: Any = None, dataset_name: Any = None, tags: Any = None, **more: Any
    ) -> None:
        """Write README.md into output_dir."""
        tags = [*([tags] if isinstance(tags, str) else tags or []), self.tag, "vlmr1"]
        known = {"dataset": dataset_name} if dataset_name is not None else {}
        super().create_model_card(model_name=model_name, tags=list(tags), **known, **more)
        if self.is_world_process_zero():
            add_tags(Path(self.args.output_dir or ".") / CARD, tags)

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
