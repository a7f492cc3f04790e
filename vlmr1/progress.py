"""What a run shows and keeps: a progress bar with ETA, a line a step, metrics.jsonl, completions.jsonl."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from vlmr1.checkpoint import truncate_after
from vlmr1.console import surviving
from vlmr1.disk import writing

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"


def step_line(logs: dict[str, float], step: int) -> str:
    """The numbers that one looks at, in one line."""
    rewards = [(k.split("/")[1], v) for k, v in logs.items() if k.startswith("rewards/") and k.endswith("/mean")]
    seconds = sum(v for k, v in logs.items() if k.startswith("seconds/"))
    parts = [f"step {step}"]
    parts += [f"{name} {value:.3f}" for name, value in rewards]
    parts += [f"kl {logs['kl']:.4f}", f"loss {logs['loss']:+.4f}", f"grad {logs['grad_norm']:.2f}"]
    parts += [f"length {logs['completion_length']:.1f}", f"flat groups {logs['zero_variance_groups']:.0%}"]
    return "  ".join([*parts, f"{seconds:.2f} s"])


class Progress(TrainerCallback):
    """Console output and the two log files; a resumed run drops what it will write again."""

    def __init__(self, output_dir: Path, *, console: bool = True):
        self.output_dir = output_dir
        self.console = console
        self.bar: tqdm | None = None
        self.trainer: Any = None  # set when there is one; its last groups are what the completions are taken from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for name in (METRICS, COMPLETIONS):
            with writing(name, self.output_dir):
                truncate_after(self.output_dir / name, state.global_step)
        if self.console:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            with surviving():
                self.bar.update(1)
        if state.is_world_process_zero and self.trainer is not None:
            self._completions(state.global_step, self.trainer.last_groups, args.log_completions)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "kl" not in logs:
            return
        self._append(METRICS, {"step": state.global_step, **logs})
        if self.console:
            with surviving():
                tqdm.write(step_line(logs, state.global_step), file=sys.stdout)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            with surviving():
                self.bar.close()

    def _completions(self, step: int, groups: Any, count: int) -> None:
        """Append up to `count` completions of a step, each with its prompt's row, images and rewards."""
        late = self.trainer.timed_out  # rewards that were not done in time, and are 0
        rows = [(group, i) for group in groups for i in range(len(group.completions))]
        for group, i in rows[:: max(1, len(rows) // count)][:count] if count else []:
            sample, completion = group.prompt.sample, group.completions[i]
            record = {
                "step": step,
                "source": sample.source,
                "images": [str(path) for path in sample.images],
                "completion": completion.text,
                "solution": sample.solution,
                "rewards": group.rewards[i].tolist(),
                "advantage": float(group.advantages[i]),
                "finish_reason": completion.finish_reason,
                "timed_out": [t.reward for t in late if (t.source, t.completion) == (sample.source, i)],
            }
            self._append(COMPLETIONS, record)

    def _append(self, name: str, record: dict[str, Any]) -> None:
        with writing(name, self.output_dir), (self.output_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(output_dir: Path) -> list[dict[str, float]]:
    """The metrics of every logged step, in order."""
    return [json.loads(line) for line in (output_dir / METRICS).read_text(encoding="utf-8").splitlines()]
