"""Settings of the evaluation during training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmr1.types import Settings, setting


class _Shared(Settings):
    shared = ("eval_steps", "eval_on_start")
    if TYPE_CHECKING:
        eval_steps: float | None
        eval_on_start: bool


@dataclass
class EvaluationSettings(_Shared):
    """Evaluation every `eval_steps` updates, and before the first update with `eval_on_start`."""

    group = "Evaluation during training"

    eval_data_file_paths: list[str] = setting([], "rows to evaluate on")
    eval_image_folders: list[str] = setting([], "image folders of these rows, as image_folders")
    eval_limit: int | None = setting(None, "evaluate on the first rows only")

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
