"""Logs of a run: metrics.jsonl, completions.jsonl, and what is shown while it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vlmr1.data.pass_rates import PassRates
from vlmr1.errors import DataError
from vlmr1.lifecycle.checkpoint import truncate_after
from vlmr1.lifecycle.disk import guard_writes
from vlmr1.report.console import Console
from vlmr1.report.pass_rates import keep_pass_rates
from vlmr1.report.pictures import keep_picture
from vlmr1.rewards.methods import converts, method_of
from vlmr1.rewards.settings import DEFAULTS
from vlmr1.types import Prompt

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"
EVALUATIONS = "eval.jsonl"
PICTURES = "completion_images"  # copies of images without a file of their own


class Progress(TrainerCallback):
    """The two log files, and console output; a resumed run drops lines that it will write again.

    A context manager around `train`: the progress line is closed there where an error ends the run."""

    def __init__(self, output_dir: Path, *, console: bool = True, pass_rates: PassRates | None = None):
        self.output_dir = output_dir
        self.console = Console() if console else None
        self.pass_rates = pass_rates  # of the run's rows, where they were chosen by them
        self.trainer: Any = None  # set later; completions are taken from its last groups

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.console is not None:
            self.console.interrupt()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            self.console = None
            return
        for name in (METRICS, COMPLETIONS):
            with guard_writes(name, self.output_dir):
                truncate_after(self.output_dir / name, state.global_step)
        if self.pass_rates is not None:
            keep_pass_rates(self.pass_rates, self.output_dir)
        if self.console is not None:
            self.console.begin(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.trainer is None:
            return
        if self.console is not None:
            self.console.step(self.trainer, args, state, control)
        if args.completions_to_log:
            self._completions(state.global_step, self.trainer.last_groups, args.completions_to_log)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # The log at the end of a run may have the metrics of the last steps too.
        if state.is_world_process_zero and not {"loss", "tokens_per_second"}.isdisjoint(logs):
            self._append(METRICS, {"step": state.global_step, **logs})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.console is not None:
            self.console.end(state)

    def _completions(self, step: int, groups: Any, count: int) -> None:
        """Append up to `count` completions of a step, with row, images and rewards."""
        late = self.trainer.timed_out  # rewards that timed out and are 0
        rows = [(group, i) for group in groups for i in range(len(group.completions))]
        for group, i in rows[:: max(1, len(rows) // count)][:count]:
            sample, completion = group.prompt.sample, group.completions[i]
            record = {
                "step": step,
                "source": sample.source,
                "images": [str(path) for path in sample.images],
                "pictures": [keep_picture(image, self.output_dir / PICTURES) for image in sample.images],
                "box_scale": self._box_scale(group.prompt),
                "completion": completion.text,
                "solution": sample.solution,
                "rewards": [None if math.isnan(value) else value for value in group.rewards[i].tolist()],
                "advantage": float(group.advantages[i]),
                "finish_reason": completion.finish_reason,
                "timed_out": [
                    t.reward for t in late if (t.source, t.completion, t.raised) == (sample.source, i, False)
                ],
            }
            raised = [t.reward for t in late if (t.source, t.completion, t.raised) == (sample.source, i, True)]
            record |= {"raised": raised} if raised else {}
            record |= {name: value for name, value in completion.logged.items() if name not in record}
            self._append(COMPLETIONS, record)

    def _box_scale(self, prompt: Prompt) -> tuple[float, float] | None:
        """Factors (sx, sy) from the completion's boxes to pixels of the image, where a reward converts them."""
        known = [(reward.name, reward.settings or DEFAULTS) for reward in self.trainer.rewards]
        boxes = [each.boxes for name, each in known if converts(name, method_of(prompt.sample, each))]
        try:
            return next((each.scale(prompt) for each in boxes), None)
        except DataError:  # images of different scales, on which boxes are not drawn
            return None

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with guard_writes(name, self.output_dir), (self.output_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """Return the metrics of every logged step, in order."""
    return read_lines(output_dir / METRICS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL log, without an unfinished last line; [] where there is no file."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not a line of a log: {error}") from error
    return found
