"""Runs of the command line that may be killed: forked from a process that has imported everything, so that each
starts in a second."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

LIMIT = 300  # seconds; a run takes two where nothing else runs
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "vlmr1.cli",
        "vlmr1.commands.arguments",
        "vlmr1.commands.train",
        "vlmr1.commands.sft",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "transformers.models.qwen2_5_vl.processing_qwen2_5_vl",
        "transformers.models.qwen2_vl.image_processing_qwen2_vl",
        "transformers.models.auto.processing_auto",
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
        "deepspeed",  # accelerate imports it whatever the engine is
    ]
)


@dataclass(frozen=True)
class Run:
    """A process, and the file that its output goes to."""

    process: BaseProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def status(self) -> int:
        """Wait for the end: the exit status, or minus the signal that ended it."""
        self.process.join(LIMIT)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {LIMIT} s:\n{self.output}")
        return self.process.exitcode


def call(function: Callable[..., Any], *arguments: Any, log: Path) -> Run:
    """Start `function(*arguments)`; what it returns is the exit status. No thread of torch is there to be forked."""
    process = CONTEXT.Process(target=_call, args=(function, arguments, log))
    process.start()
    return Run(process, log)


def start(words: Sequence[str], log: Path, prepare: Callable[[], None] | None = None) -> Run:
    """Start `vlmr1 words`, after `prepare()` in its process."""
    return call(_main, list(words), prepare, log=log)


def finish(words: Sequence[str], log: Path, prepare: Callable[[], None] | None = None) -> tuple[int, str]:
    """Run `vlmr1 words` to its end: exit status and output."""
    run = start(words, log, prepare)
    return run.status(), run.output


def _main(words: list[str], prepare: Callable[[], None] | None) -> int:
    from vlmr1.cli import main

    if prepare is not None:
        prepare()
    return main(words)


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], log: Path) -> None:
    gc.freeze()  # a collection would look through all that was imported, and copy its pages
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    multiprocessing.set_start_method("fork", force=True)  # loader workers start as in a run of its own
    torch.set_num_threads(1)  # several would wait for each other, and for the other tests
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # weights in one thread: torch's pool is made anew after a fork
    sys.exit(function(*arguments))
