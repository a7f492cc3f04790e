"""Checks of the output directory and its disk space, and one-line errors for failed writes."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vlmr1.errors import OutputError
from vlmr1.lifecycle.checkpoint import last_complete

logger = logging.getLogger(__name__)
GIB = 2**30
# Optimizer states per parameter, by a part of the optimizer's name.
MOMENTS = {"ademamix": 3, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1}
TORCH_WRITER = "inline_container"  # source file named in torch.save's errors, which are RuntimeErrors


@contextmanager
def guard_writes(what: str, output_dir: Path) -> Iterator[None]:
    """Context manager that turns a failed write into an OutputError: reason, free space, last checkpoint."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        last = last_complete(output_dir)
        resume = (
            f". {last.name} is complete: fix the problem and run the same command to resume from it" if last else ""
        )
        free = f"{_free(output_dir) / GIB:.2f} GiB free without it"
        raise OutputError(f"{what} cannot be written to {output_dir}: {reason}; {free}{resume}") from error


def check_output_dir(output_dir: Path) -> None:
    """OutputError if the directory cannot be created or written; leaves no file."""
    try:
        with tempfile.TemporaryDirectory(dir=_existing(output_dir), prefix=".vlmr1-") as folder:
            (Path(folder) / "file").write_bytes(bytes(4096))
    except OSError as error:
        raise OutputError(f"output_dir {output_dir} cannot be written: {error.strerror}") from error


def warn_if_low_space(output_dir: Path, needed: int) -> None:
    """Warn if a checkpoint of `needed` bytes does not fit; an old one is removed only after the new one is written."""
    free = _free(output_dir)
    if free < needed:
        logger.warning(
            "%s has %.2f GiB free, but a checkpoint takes about %.2f GiB", output_dir, free / GIB, needed / GIB
        )


def checkpoint_bytes(model: Any, optim: str, *, weights_only: bool = False) -> int:
    """Estimate the bytes of a checkpoint: weights (only those of an adapter with PEFT) and optimizer states."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = trained if hasattr(model, "peft_config") else model.parameters()
    total = sum(parameter.nbytes for parameter in weights)
    moments = next((count for name, count in MOMENTS.items() if name in optim), 0)
    if weights_only or not moments:
        return total
    bits = re.search(r"([48])bit", optim)
    return total + moments * sum(p.numel() * int(bits.group(1)) // 8 if bits else p.nbytes for p in trained)


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def _free(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _reason(error: Exception) -> str | None:
    """Return why a file could not be written, with the system's message if any; None for other errors."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        match = re.search(r"I/O error: (.*?) \(os error", str(error))
        return match.group(1) if match else str(error)
    return "torch.save failed" if TORCH_WRITER in str(error) else None
