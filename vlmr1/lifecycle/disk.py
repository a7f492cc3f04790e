"""What can be wrong with the disk of an output directory: one message, before the model is loaded where possible."""

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
MOMENTS = {"ademamix": 3, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1}  # by a part of the optimizer's name
TORCH_WRITER = "inline_container"  # the file that torch.save's errors are from; their class is RuntimeError


@contextmanager
def writing(what: str, output_dir: Path) -> Iterator[None]:
    """A failure to write becomes an OutputError: what, where, why, how much room there is, and what is whole."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        last = last_complete(output_dir)
        whole = f". {last.name} is whole: after that is mended, the same command continues from it" if last else ""
        room = f"{_free(output_dir) / GIB:.2f} GiB are free there without it"
        raise OutputError(f"{what} cannot be written to {output_dir}: {reason}; {room}{whole}") from error


def check_output_dir(output_dir: Path) -> None:
    """Raises OutputError where the directory cannot be made or written. Leaves nothing behind."""
    try:
        with tempfile.TemporaryDirectory(dir=_existing(output_dir), prefix=".vlmr1-") as folder:
            (Path(folder) / "file").write_bytes(bytes(4096))
    except OSError as error:
        raise OutputError(f"output_dir {output_dir} cannot be written: {error.strerror}") from error


def warn_of_space(output_dir: Path, needed: int) -> None:
    """A warning where a checkpoint of `needed` bytes has no room: an old one goes when the new one is there."""
    free = _free(output_dir)
    if free < needed:
        logger.warning(
            "%s has %.2f GiB free, and a checkpoint takes about %.2f GiB: it will not fit",
            output_dir,
            free / GIB,
            needed / GIB,
        )


def checkpoint_bytes(model: Any, optim: str, *, weights_only: bool = False) -> int:
    """About what a checkpoint takes: the weights (an adapter's, where there is one) and the optimizer's moments of what
    is trained: 3 times the weights for AdamW in float32."""
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
    """Why a file could not be written, in the system's words where there are some; None for other errors."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):
        found = re.search(r"I/O error: (.*?) \(os error", str(error))
        return found.group(1) if found else str(error)
    return "torch.save did not get to its end" if TORCH_WRITER in str(error) else None
