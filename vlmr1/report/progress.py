"""Progress bar, console line for each step, metrics.jsonl and completions.jsonl of a run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from vlmr1.data.pass_rates import PassRates
from vlmr1.errors import DataError
from vlmr1.lifecycle.checkpoint import truncate_after
from vlmr1.lifecycle.console import ignore_broken_pipe
from vlmr1.lifecycle.disk import guard_writes
from vlmr1.report.pass_rates import keep_pass_rates
from vlmr1.report.pictures import keep_picture
from vlmr1.rewards.methods import converts, method_of
from vlmr1.rewards.settings import DEFAULTS
from vlmr1.types import Prompt

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"
PICTURES = "completion_images"  # copies of images without a file of their own
WIDTH = 176  # columns of the console line of a step


def step_line(logs: dict[str, float], step: int, width: int = WIDTH) -> str:
    """Return the main metrics in one line; the least important are left out where it would exceed `width`."""
    seconds = sum(v for k, v in logs.items() if k.startswith("seconds/"))
    rewards = [(k[8:-5], v) for k, v in logs.items() if k.startswith("rewards/") and k.endswith("/mean")]
    parts = [(0, f"step {step}")]  # importance, 0 the highest, and text
    for place, (name, value) in enumerate(rewards):
        parts.append((1 + place, f"{name.rpartition(':')[2]} {value:.3f}\u00b1{logs[f'rewards/{name}/std']:.2f}"))
    parts += [(2, f"kl {logs['kl']:.4f}")] if "kl" in logs else [(1, f"loss {logs['loss']:.4f}")]
    parts += [(4, f"ent {logs['entropy']:.2f}")] if "entropy" in logs else []
    parts += (
        [(5, f"clip {logs['clip_low']:.1%}/{logs['clip_high']:.1%}".replace("%/", "/"))] if "clip_low" in logs else []
    )
    parts += [(3, f"grad {logs['grad_norm']:.2f}")] if "grad_norm" in logs else []  # not at the end of a run
    parts.append((2, f"len {logs['completion_length']:.0f}"))
    parts += [(2, f"zero_var {logs['zero_variance_groups']:.0%}")] if "zero_variance_groups" in logs else []
    parts.append((4, f"truncated {logs['truncated']:.0%}"))
    if "parse_failures" in logs:
        parts.append((3, f"no_answer {logs['parse_failures']:.0%}"))
    parts += [(6, f"{logs['tokens_per_second']:.0f} t/s"), (5, f"{logs['memory/peak_mib'] / 1024:.1f} GiB")]
    parts.append((1, f"{seconds:.2f} s"))
    while len(parts) > 1 and len("  ".join(text for _, text in parts)) > width:
        parts.remove(max(reversed(parts), key=lambda part: part[0]))
    return "  ".join(text for _, text in parts)


class Progress(TrainerCallback):
    """Console output and the two log files; a resumed run drops lines that it will write again."""

    def __init__(self, output_dir: Path, *, console: bool = True, pass_rates: PassRates | None = None):
        self.output_dir = output_dir
        self.console = console
        self.pass_rates = pass_rates  # of the run's rows, where they were chosen by them
        self.bar: tqdm | None = None
        self.trainer: Any = None  # set later; completions are taken from its last groups

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for name in (METRICS, COMPLETIONS):
            with guard_writes(name, self.output_dir):
                truncate_after(self.output_dir / name, state.global_step)
        if self.pass_rates is not None:
            keep_pass_rates(self.pass_rates, self.output_dir)
        if self.console:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            with ignore_broken_pipe():
                self.bar.update(1)
        if state.is_world_process_zero and self.trainer is not None and args.completions_to_log:
            self._completions(state.global_step, self.trainer.last_groups, args.completions_to_log)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:  # the log at the end of a run
            return
        self._append(METRICS, {"step": state.global_step, **logs})
        if self.console:
            with ignore_broken_pipe():
                tqdm.write(step_line(logs, state.global_step), file=sys.stdout)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            with ignore_broken_pipe():
                self.bar.close()

    def _completions(self, step: int, groups: Any, count: int) -> None:
        """Append up to `count` completions of a step, with row, images and rewards."""
        late = self.trainer.timed_out  # rewards that timed out and are 0
        rows = [(group, i) for group in groups for i in range(len(group.completions))]
        for group, i in rows[:: max(1, len(rows) // count)][:count] if count else []:
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
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(True) if line.endswith("\n")]
