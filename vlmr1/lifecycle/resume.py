"""Going on from a checkpoint that is deleted, changed or damaged meanwhile: one message, never half of its state."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from vlmr1.errors import CheckpointError, SettingError
from vlmr1.lifecycle.checkpoint import fault_of, is_adapter, last_complete


def find_checkpoint(output_dir: Path, named: str | None) -> Path | None:
    """The checkpoint to continue from: `named` (resume_from_checkpoint), or the last complete one of the output
    directory."""
    if named is None:
        return last_complete(output_dir)
    fault = fault_of(Path(named))
    if fault:
        raise SettingError(f"resume_from_checkpoint: {named} is not a complete checkpoint: {fault}")
    return Path(named)


def is_last(checkpoint: Path) -> bool:
    """Whether it was written at the end of its run."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def check_resumable(checkpoint: Path) -> None:
    """SettingError where it holds weights only, and its run has not ended: the trainer would go on with a new optimizer
    and say nothing."""
    whole = any(checkpoint.glob("rng_state*.pth"))  # written with the optimizer's state, by every engine
    if whole or is_last(checkpoint):
        return
    merge = ", once `vlmr1 merge` has made a model of it" if is_adapter(checkpoint) else ""
    raise SettingError(
        f"{checkpoint} has no optimizer state (save_only_model) and cannot be resumed. Start another run from its "
        f"weights, with another output_dir and model_name_or_path={checkpoint}{merge}"
    )


class Resuming(TrainerCallback):
    """A context around training, and the callback that knows when everything is read: when the first step
    begins.

    The trainer reads one file after the other and goes on without those that are not there, so the checkpoint is looked
    at once more. Raises CheckpointError."""

    def __init__(self) -> None:
        self.checkpoint: Path | None = None  # set when there is one
        self.done = False

    def __enter__(self) -> Resuming:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.checkpoint is None or self.done or not isinstance(error, Exception):
            return
        self._check(self.checkpoint, error)
        if _is_of_content(error, trace):
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"{self.checkpoint} cannot be read ({reason}): remove it, and the same command continues from the one "
                "before, or begins again"
            ) from error

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.checkpoint is not None and not self.done:
            self._check(self.checkpoint, None)
        self.done = True

    def _check(self, checkpoint: Path, error: Exception | None) -> None:
        fault = fault_of(checkpoint)
        if fault is not None:
            raise CheckpointError(
                f"{checkpoint} was deleted or changed while it was read ({fault}): "
                "the same command continues from the one before, or begins again"
            ) from error


def _is_of_content(error: Exception, trace: TracebackType | None) -> bool:
    """Whether a file was not what it should be: torch has many exceptions for that, all from its reader, or from where
    states are taken."""
    if isinstance(error, SafetensorError):
        return True
    codes = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    read = any(code.co_filename == torch.serialization.__file__ or code.co_name == "load_state_dict" for code in codes)
    return read and not isinstance(error, torch.OutOfMemoryError)
