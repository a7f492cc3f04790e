"""Settings of the evaluation during training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmr1.types import Settings, setting


class _Shared(Settings):
    shared = ("eval_steps", "eval_on_start", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
    shared += ("save_strategy", "save_steps")
    if TYPE_CHECKING:
        eval_steps: float | None
        eval_on_start: bool
        load_best_model_at_end: bool
        metric_for_best_model: str | None
        greater_is_better: bool | None
        save_strategy: str
        save_steps: float
        reward_funcs: list[str]


@dataclass
class EvaluationSettings(_Shared):
    """Evaluation every `eval_steps` updates, and before the first update with `eval_on_start`."""

    group = "Evaluation during training"

    eval_data_file_paths: list[str] = setting([], "rows to evaluate on")
    eval_image_folders: list[str] = setting([], "image folders of these rows, as image_folders")
    eval_limit: int | None = setting(None, "evaluate on the first rows only")
    best_metric = "reward"  # default of metric_for_best_model
    has_box_metrics = True  # beside `evaluation_metrics`

    @property
    def evaluation_metrics(self) -> Sequence[str]:
        """The metrics of an evaluation, without those of boxes."""
        return ("reward", "completion_length", "truncated", *(f"rewards/{each}/mean" for each in self.reward_funcs))

    def check(self) -> Iterator[str]:
        if self.eval_steps is not None:
            if self.eval_steps < 1 or self.eval_steps != int(self.eval_steps):
                yield f"eval_steps is {self.eval_steps:g}: it must be a whole number, at least 1"
            else:
                self.eval_steps = int(self.eval_steps)
        yield from self.at_least(1, "eval_limit")
        if self.eval_image_folders and not self.eval_data_file_paths:
            yield "eval_image_folders needs eval_data_file_paths"
        for name in ("eval_data_file_paths", "eval_limit"):
            if getattr(self, name) and self.eval_steps is None and not self.eval_on_start:
                yield f"{name} needs eval_steps or eval_on_start: nothing is evaluated without"
        yield from self._check_best()

    def _check_best(self) -> Iterator[str]:
        """Faults of the choice of a checkpoint by an evaluation."""
        names = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
        given = [name for name in names if getattr(self, name) not in (None, False)]
        saves = getattr(self.save_strategy, "value", self.save_strategy)
        if saves == "best":
            given.insert(0, "save_strategy=best")
        elif given and not self.load_best_model_at_end:
            yield f"{given[0]} has no effect without load_best_model_at_end or save_strategy=best"
            return
        if not given:
            return
        if self.eval_steps is None:
            yield f"{given[0]} needs eval_steps: checkpoints are compared by their evaluations"
        elif saves in ("no", "epoch"):
            yield f"{given[0]} needs save_strategy steps or best, it is {saves}"
        elif saves == "steps" and self.eval_steps >= 1 and self.save_steps % self.eval_steps:
            yield (
                f"{given[0]}: save_steps, {self.save_steps:g}, is no multiple of eval_steps, {self.eval_steps:g}: each "
                "checkpoint needs an evaluation"
            )
        known = self.evaluation_metrics
        name, boxes = metric_name(self.metric_for_best_model or self.best_metric), self.has_box_metrics
        if name not in known and not (boxes and name.startswith(("rec/", "ovd/"))):
            of_boxes = ", rec/... and ovd/..." if boxes else ""
            yield f"metric_for_best_model is {name!r}: known are {', '.join(known)}{of_boxes}"


def metric_name(name: str) -> str:
    """Return the name of an evaluation's metric without the prefix that trackers and eval.jsonl give it."""
    return name.removeprefix("eval_").removeprefix("eval/")
