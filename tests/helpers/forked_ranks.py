"""Two ranks as torchrun would start them, forked from a process that has imported everything."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.forked import Run, call
from tests.helpers.two_ranks import metrics, words
from vlmr1.distributed.launch import FSDP2, launch_command


def run_forked(
    engine: str, folder: Path, output: Path, prepare: Callable[[], None] | None = None, **more: Any
) -> list[dict[str, float]]:
    """The metrics of a run on two ranks; each has a prompt an update, and calls `prepare` first."""
    arguments = words(folder, output, prompts_per_device=1, ddp_timeout=200, **more)  # who waits in vain fails
    if engine == "fsdp2":
        variables, arguments = FSDP2 | {"ACCELERATE_TORCH_DEVICE": "cpu"}, ["train", *arguments]
    else:
        variables, command = launch_command(engine, 2, arguments)
        arguments = command[command.index("train") :]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | meeting | variables
    logs = [output.with_name(f"{output.name}-{rank}.log") for rank in range(2)]
    own = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    runs: list[Run] = []
    try:
        for rank in range(2):
            runs.append(call(one_rank, arguments, own[rank], prepare, log=logs[rank]))
        statuses = [run.status() for run in runs]
    finally:
        for run in runs:
            run.process.kill()  # nothing where it has ended
            run.process.join()
    assert statuses == [0, 0], [run.output[-3000:] for run in runs]
    return metrics(output)


def one_rank(arguments: list[str], variables: dict[str, str], prepare: Callable[[], None] | None) -> int:
    os.environ.update(variables)
    if "ACCELERATE_USE_FSDP" in variables:
        from tests.helpers import fsdp_on_cpu

        fsdp_on_cpu.allow()
    if prepare is not None:
        prepare()
    from vlmr1.cli import main

    return main(arguments)
