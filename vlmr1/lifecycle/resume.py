"""Checks of a checkpoint to resume from, before and while it is loaded."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from vlmr1.errors import CheckpointError, SettingError
from vlmr1.lifecycle.checkpoint import integrity_error, last_complete


def find_checkpoint(output_dir: Path, named: str | Literal[False] | None) -> Path | None:
    """The checkpoint to continue from: `named` (resume_from_checkpoint), or the last complete one of the output
    directory. SettingError where there is one, and the run is to start from the beginning (False)."""
    if named is None or named is False:
        found = last_complete(output_dir)
        if found is not None and named is False:
            raise SettingError(
                f"resume_from_checkpoint is false, and {found} is there: remove it or give another output_dir to start "
                "over, or leave the setting out to continue"
            )
        return found
    fault = integrity_error(Path(named))
    if fault:
        raise SettingError(f"resume_from_checkpoint: {named} is not a complete checkpoint: {fault}")
    return Path(named)


def is_final(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written at the end of its run."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    return state.global_step >= state.max_steps


def check_resumable(checkpoint: Path) -> None:
    """SettingError for weights of an unfinished run: the trainer would silently continue with a new optimizer."""
    has_state = any(checkpoint.glob("rng_state*.pth"))  # written with the optimizer state by every engine
    if has_state or is_final(checkpoint):
        return
    raise SettingError(
        f"{checkpoint} has no optimizer state (save_only_model) and cannot be resumed. Start another run from its "
        f"weights, with another output_dir and model_name_or_path={checkpoint}"
    )


class ResumeGuard(TrainerCallback):
    """Context manager and callback that raise CheckpointError if the checkpoint is damaged or changes while loading.

    The trainer skips missing files, so the checkpoint is checked again after loading, when the first step begins."""

    def __init__(self) -> None:
        self.checkpoint: Path | None = None  # set if the run resumes
        self.done = False

    def __enter__(self) -> ResumeGuard:
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
                f"{self.checkpoint} cannot be read ({reason}): remove it and run the same command, which resumes from "
                "the checkpoint before it, or starts over"
            ) from error

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.checkpoint is not None and not self.done:
            self._check(self.checkpoint, None)
        self.done = True

    def _check(self, checkpoint: Path, error: Exception | None) -> None:
        fault = integrity_error(checkpoint)
        if fault is not None:
            raise CheckpointError(
                f"{checkpoint} was deleted or changed while it was read ({fault}): run the same command, which resumes "
                "from the checkpoint before it, or starts over"
            ) from error


def _is_of_content(error: Exception, trace: TracebackType | None) -> bool:
    """Return whether an error is due to the content of a file: torch raises many types, when reading or loading."""
    if isinstance(error, SafetensorError):
        return True
    codes = [frame.f_code for frame, _ in traceback.walk_tb(trace)]
    read = any(code.co_filename == torch.serialization.__file__ or code.co_name == "load_state_dict" for code in codes)
    return read and not isinstance(error, torch.OutOfMemoryError)
