"""Directory of a run: the checkpoint that it goes on from, its report, and the upload of its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from vlmr1.errors import SettingError
from vlmr1.lifecycle.checkpoint import checkpoint_path, remove_staging
from vlmr1.lifecycle.resume import check_resumable, find_checkpoint
from vlmr1.report.training import write_run_report
from vlmr1.training.final_model import leave_model
from vlmr1.training.hub import push_model

CARD = "README.md"


def checkpoint_of(trainer: Any, named: str | bool | None) -> str | None:
    """Return the checkpoint to go on from: the one of this name, with True the last complete one of output_dir."""
    folder = _folder(trainer)
    if trainer.ranks.is_first:
        remove_staging(folder)
    trainer.ranks.barrier()
    if not named:
        return None
    checkpoint = find_checkpoint(folder, None if named is True else str(named))
    if checkpoint is None:
        raise SettingError(f"resume_from_checkpoint: there is no complete checkpoint in {folder}")
    check_resumable(checkpoint)
    return str(checkpoint)


def is_done(trainer: Any, checkpoint: str) -> bool:
    """Return whether the updates that the settings ask for were made before this checkpoint, and load its weights and
    state: the library would make one more."""
    args = trainer.args
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if args.max_steps > 0:
        done = state.global_step >= args.max_steps
    else:
        done = state.epoch is not None and state.epoch >= args.num_train_epochs
    return done and trainer.is_finished(Path(checkpoint))


def present_checkpoint(trainer: Any) -> str:
    """Return the directory of the checkpoint of the present step."""
    return str(checkpoint_path(_folder(trainer), trainer.state.global_step))


class Page(type(Path())):  # type: ignore[misc]
    """Path of an HTML page, which a notebook shows below the cell."""

    def _repr_html_(self) -> str:
        page = escape(self.read_text(encoding="utf-8"))
        return f'<p>{escape(str(self))}</p><iframe srcdoc="{page}" width="100%" height="800"></iframe>'


def write_report(trainer: Any, path: str | Path | None) -> Page:
    """Write the HTML report of the run, and return its path."""
    return Page(write_run_report(_folder(trainer), None if path is None else Path(path)))


def model_name(trainer: Any) -> str:
    """Name of the model in its card: that of its repository, or of output_dir."""
    return (trainer.args.hub_model_id or _folder(trainer).absolute().as_posix()).split("/")[-1]


def add_tags(path: Path, tags: Sequence[str]) -> None:
    """Add tags to a model card. PEFT replaces those of a card by its own."""
    card: Any = ModelCard.load(path)
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *tags]))
    card.save(path)


def push(trainer: Any, message: str, card: Mapping[str, Any]) -> str | None:
    """Leave the model in output_dir, write its card, and upload both."""
    names = leave_model(trainer, None)
    if not trainer.ranks.is_first:
        return None
    trainer.create_model_card(**card)
    return push_model(trainer.args, [*names, CARD], message)


def _folder(trainer: Any) -> Path:
    return Path(trainer.args.output_dir or ".")
