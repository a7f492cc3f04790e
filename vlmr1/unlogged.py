"""What a checkpoint keeps of the logs: the steps since the last line, and the updates that were skipped."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmr1.types import StepMetrics

UNLOGGED = "unlogged.json"


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
