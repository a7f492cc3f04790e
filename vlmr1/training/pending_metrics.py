"""The steps since the last line of the logs: what that line says of them, and how a checkpoint keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmr1.grpo.loss import MAXIMA, MINIMA
from vlmr1.types import StepMetrics

UNLOGGED = "unlogged.json"
UPDATE = ("forward", "backward", "update")  # phases


def save_unlogged(trainer: Any, checkpoint: Path) -> None:
    """Write what the next line of the logs will be a mean of, so far."""
    state = {
        "steps": [asdict(step) for step in trainer.unlogged],
        "loss": float(trainer._tr_loss),
        "last_logged": trainer._globalstep_last_logged,
        "skipped": trainer.skipped,
        "nonfinite": trainer.nonfinite,
    }
    (checkpoint / UNLOGGED).write_text(json.dumps(state), encoding="utf-8")


def load_unlogged(trainer: Any, checkpoint: Path) -> None:
    """Take it back; checkpoints of before have none."""
    path = checkpoint / UNLOGGED
    if not path.exists():
        return
    state = json.loads(path.read_text(encoding="utf-8"))
    trainer.unlogged = [StepMetrics(**step) for step in state["steps"]]
    trainer._tr_loss += state["loss"]
    trainer._globalstep_last_logged = state["last_logged"]
    trainer.skipped, trainer.nonfinite = state["skipped"], state["nonfinite"]


def combined(name: str, values: Sequence[float]) -> float:
    """One number of several steps: their mean, or what the metric is the greatest or the least of."""
    if name in MAXIMA:
        return max(values)
    return min(values) if name in MINIMA else sum(values) / len(values)


def costs(steps: Sequence[StepMetrics]) -> dict[str, float]:
    """Seconds a step and the highest peak memory by phase, and completion tokens a second: of all phases, and of the
    update alone."""
    phases = dict.fromkeys(phase for step in steps for phase in step.seconds)
    seconds = {phase: sum(step.seconds.get(phase, 0.0) for step in steps) for phase in phases}
    tokens = sum(step.values.get("tokens", 0.0) for step in steps)
    logs = {f"seconds/{phase}": value / len(steps) for phase, value in seconds.items()}
    for phase in dict.fromkeys(phase for step in steps for phase in step.memory):
        logs[f"memory/{phase}_mib"] = max(step.memory.get(phase, 0.0) for step in steps)
    logs["tokens_per_second"] = tokens / sum(seconds.values())
    logs["update/tokens_per_second"] = tokens / sum(seconds.get(phase, 0.0) for phase in UPDATE)
    return logs
