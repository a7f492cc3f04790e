"""Metrics of the steps since the last log: how the next log combines them, and how a checkpoint keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vlmr1.distributed.metrics import MAXIMA, MINIMA
from vlmr1.types import StepMetrics

PENDING = "unlogged.json"  # of a checkpoint
UPDATE = ("forward", "backward", "update")  # phases


@dataclass
class PendingMetrics:
    """The steps since the last log."""

    steps: list[StepMetrics] = field(default_factory=list)

    def take(self) -> dict[str, float]:
        """Their means, or maxima, and what they cost; none are left."""
        steps, self.steps = self.steps, []
        names = dict.fromkeys(name for step in steps for name in step.values)
        found = {name: [step.values[name] for step in steps if name in step.values] for name in names}
        return {name: combined(name, values) for name, values in found.items()} | costs(steps)


def save_pending(trainer: Any, checkpoint: Path) -> None:
    """Write what the next line of the logs will combine, so far."""
    state = {
        "steps": [asdict(step) for step in trainer.pending.steps],
        "loss": float(trainer._tr_loss),
        "last_logged": trainer._globalstep_last_logged,
        "skipped": trainer.skipped,
        "nonfinite": trainer.nonfinite,
    }
    (checkpoint / PENDING).write_text(json.dumps(state), encoding="utf-8")


def load_pending(trainer: Any, checkpoint: Path) -> None:
    """Take it back; old checkpoints have none."""
    path = checkpoint / PENDING
    if not path.exists():
        return
    state = json.loads(path.read_text(encoding="utf-8"))
    trainer.pending.steps = [StepMetrics(**step) for step in state["steps"]]
    trainer._tr_loss += state["loss"]
    trainer._globalstep_last_logged = state["last_logged"]
    trainer.skipped, trainer.nonfinite = state["skipped"], state["nonfinite"]


def combined(name: str, values: Sequence[float]) -> float:
    """One number for several steps: their mean, maximum or minimum, by the metric's name."""
    if name in MAXIMA:
        return max(values)
    return min(values) if name in MINIMA else sum(values) / len(values)


def costs(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Seconds a step and the highest peak memory by phase, and completion tokens a second: over all phases, and over
    the update alone."""
    phases = dict.fromkeys(phase for step in steps for phase in step.seconds)
    seconds = {phase: sum(step.seconds.get(phase, 0.0) for step in steps) for phase in phases}
    tokens = sum(step.values.get("tokens", 0.0) for step in steps)
    logs = {f"seconds/{phase}": value / len(steps) for phase, value in seconds.items()}
    for phase in dict.fromkeys(phase for step in steps for phase in step.memory):
        logs[f"memory/{phase}_mib"] = max(step.memory.get(phase, 0.0) for step in steps)
    logs["tokens_per_second"] = tokens / sum(seconds.values())
    logs["update/tokens_per_second"] = tokens / sum(seconds.get(phase, 0.0) for phase in UPDATE)
    return logs
