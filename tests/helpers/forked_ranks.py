"""Two ranks as torchrun would start them, forked from a process that has imported everything."""

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.helpers.forked import Run, call
from tests.helpers.two_ranks import computed, metrics, resumable, words
from vlmr1.distributed.launch import FSDP2, launch_command


def start_ranks(
    function: Callable[..., int], *arguments: Any, logs: Path, variables: Mapping[str, str] | None = None
) -> list[Run]:
    """Start `function(*arguments)`, which returns the exit status, on two ranks. The output of a rank goes to
    `logs`-RANK.log; `variables` are added to its environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | meeting | dict(variables or {})
    own = [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return [call(one_rank, own[rank], function, arguments, log=Path(f"{logs}-{rank}.log")) for rank in range(2)]


def one_rank(variables: dict[str, str], function: Callable[..., int], arguments: tuple[Any, ...]) -> int:
    os.environ.update(variables)
    return function(*arguments)


def finish_ranks(runs: list[Run]) -> list[int]:
    """Wait for all ranks; return their exit statuses. None is left where one hangs."""
    try:
        return [run.status() for run in runs]
    finally:
        for run in runs:
            run.process.kill()  # nothing where it has ended
            run.process.join()


def run_forked(
    engine: str, folder: Path, output: Path, prepare: Any = None, environment: Any = None, **more: Any
) -> list[dict[str, float]]:
    """The metrics of a run on two ranks; each has a prompt an update, and calls `prepare` first. `environment` has
    variables that differ from those of the engine's launch."""
    arguments = words(folder, output, prompts_per_device=1, **more)
    return run_command(engine, ["train", *arguments], output, prepare, environment)


def run_command(
    engine: str, arguments: list[str], output: Path, prepare: Any = None, environment: Any = None
) -> list[dict[str, float]]:
    """The metrics of `vlmr1 arguments` on two ranks, as `run_forked`."""
    command, *arguments = [*arguments, "--ddp_timeout", "200"]  # who waits in vain fails
    if engine == "fsdp2":
        variables, arguments = FSDP2 | {"ACCELERATE_TORCH_DEVICE": "cpu"}, [command, *arguments]
    else:
        variables, launched = launch_command(engine, 2, arguments, command)
        arguments = launched[launched.index(command) :]
    runs = start_ranks(run_vlmr1, arguments, prepare, logs=output, variables=variables | (environment or {}))
    assert finish_ranks(runs) == [0, 0], [run.output[-3000:] for run in runs]
    return metrics(output)


def assert_resumes(engine: str, folder: Path, run: Path, update: int = 3, **more: Any) -> Path:
    """A run that goes on from the checkpoint behind this update of `run` computes the same, bit for bit."""
    resumed = resumable(run, run.with_name(f"resumed-{update}"), update)
    assert computed(run_forked(engine, folder, resumed, **more)) == computed(metrics(run))
    return resumed


def run_vlmr1(arguments: list[str], prepare: Callable[[], None] | None) -> int:
    if "ACCELERATE_USE_FSDP" in os.environ:  # accelerate has FSDP for GPUs only, torch for CPUs too
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType

        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    if prepare is not None:
        prepare()
    from vlmr1.cli import main

    return main(arguments)
