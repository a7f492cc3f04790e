"""`vlmr1 train --launch NAME`: prints and runs the torchrun command that starts one process per device.

Engines are configured as by `accelerate launch`: by environment variables, and for DeepSpeed by a file of configs/.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from vlmr1.errors import SettingError

# torchrun forwards the signals and waits, while ranks finish their step and write a checkpoint.
SIGNALS = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "3600")
CONFIGS = Path(__file__).parent / "configs"
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def _deepspeed(name: str) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(CONFIGS / f"{name}.json")}


LAUNCHES: Mapping[str, Mapping[str, str]] = {
    "ddp": {},
    "fsdp2": FSDP2,
    "zero2": _deepspeed("zero2"),
    "zero3": _deepspeed("zero3"),
    "zero3-offload": _deepspeed("zero3-offload"),
}


def launch_command(name: str, processes: int, arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return (environment variables to add, command) that trains with `arguments` in `processes` local processes.

    SettingError for an unknown engine, fewer than one process, or an engine that needs GPUs where there are none."""
    if name not in LAUNCHES:
        raise SettingError(f"--launch: unknown {name!r}; known: {', '.join(LAUNCHES)}")
    if processes < 1:
        raise SettingError(f"--processes is {processes}: it must be at least 1")
    environment = dict(LAUNCHES[name])
    if not torch.cuda.is_available():
        more, flags = _on_cpu(name)
        environment, arguments = environment | more, [*arguments, *flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *SIGNALS]
    return environment, [sys.executable, *torchrun, "-m", "vlmr1.cli", "train", *arguments]


def _on_cpu(name: str) -> tuple[dict[str, str], list[str]]:
    """Return (environment variables, arguments) that an engine needs additionally on CPU."""
    if name == "ddp":
        return {}, ["--use_cpu", "true"]
    if name == "fsdp2":
        raise SettingError("--launch fsdp2 needs GPUs: accelerate has no FSDP on CPU")
    return {"DS_ACCELERATOR": "cpu"}, ["--ddp_backend", "gloo"]


def check_processes(world: int) -> None:
    """SettingError if this process sees another number of processes than were launched."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes != world:
        raise SettingError(
            f"{processes} processes were launched, but this one sees {world}: on CPU set use_cpu (DDP), or ddp_backend "
            "gloo (DeepSpeed)"
        )


def check_launched(world: int, accelerator: Any) -> None:
    """SettingError if the processes do not see each other, or the requested engine is not in use."""
    check_processes(world)
    for name, engine in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        if os.environ.get(name, "").lower() == "true" and accelerator.distributed_type != engine:
            raise SettingError(f"{name} is set, but accelerate uses {accelerator.distributed_type.value} here")


def launch(name: str, processes: int | None, arguments: Sequence[str]) -> NoReturn:
    """Print the launch command and replace this process by it; one process per GPU by default."""
    count = processes or torch.cuda.device_count() or 1
    environment, command = launch_command(name, count, arguments)
    words = [f"{key}={shlex.quote(value)}" for key, value in environment.items()]
    print(" ".join([*words, *map(shlex.quote, command)]), flush=True)
    os.execvpe(command[0], command, os.environ | environment)


def launch_name() -> str:
    """Return the name of the engine that this process was launched with, as for --launch."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp2"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        return Path(path).stem if path else f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', 2)}"
    return "ddp"
