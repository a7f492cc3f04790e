"""Survive closed pipes: a run continues without its console output. No messages that libraries log when imported."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from warnings import filterwarnings

from tqdm import tqdm

# They report optional kernels that cannot be loaded, and names that other libraries register.
NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops")


def quiet_imports() -> None:
    """Keep messages that no setting can change off the screen; to be called before these libraries are imported."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Not its level, which DeepSpeed sets when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
    filterwarnings("ignore", "IProgress not found")  # in notebooks; tqdm's bars are not used there
    filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft reads it


@contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """Context manager for output during a run: an error of stdout or stderr ends the output, not the run.

    Examples are a full disk, a closed terminal, and `| tee`, which ends with the Ctrl-C that should save the run."""
    try:
        yield
    except OSError:
        redirect_broken_streams()


def redirect_broken_streams() -> None:
    """Redirect stdout and stderr to /dev/null if they cannot be written; Python would exit with status 120."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends


def print_fatal(message: str) -> None:
    """Print a message to stderr before the process exits, if stderr can be written."""
    with ignore_broken_pipe():
        for bar in list(getattr(tqdm, "_instances", ())):  # the message would be appended to its line
            bar.close()
        print(f"vlmr1: {message}", file=sys.stderr)
    redirect_broken_streams()
