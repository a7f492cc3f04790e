"""`vlmr1 train|sft --launch NAME`: prints and runs the torchrun command that starts one process per device.

Engines are configured as by `accelerate launch`: by environment variables, and for DeepSpeed by a file of configs/.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from vlmr1.distributed.deepspeed_file import CONFIGS, VARIABLE, engine_of_environment
from vlmr1.errors import SettingError, missing_package

# torchrun forwards the signals and waits, while ranks finish their step and write a checkpoint.
SIGNALS = ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout", "3600")
OWN_FILE = "--deepspeed"  # in place of a name
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def _deepspeed(name: str) -> dict[str, str]:
    return {"ACCELERATE_USE_DEEPSPEED": "true", VARIABLE: str(CONFIGS / f"{name}.json")}


LAUNCHES: Mapping[str, Mapping[str, str]] = {
    "ddp": {},
    "fsdp2": FSDP2,
    "zero2": _deepspeed("zero2"),
    "zero3": _deepspeed("zero3"),
    "zero3-offload": _deepspeed("zero3-offload"),
    OWN_FILE: {},  # each process reads it
}


def launch_command(
    name: str, processes: int, arguments: Sequence[str], command: str = "train"
) -> tuple[dict[str, str], list[str]]:
    """Return (environment variables to add, command) that trains with `arguments` in `processes` local processes.

    SettingError for an unknown engine, fewer than one process, or an engine that needs GPUs where there are none."""
    faults = []
    if name not in LAUNCHES:
        known = ", ".join(each for each in LAUNCHES if each != OWN_FILE)
        faults.append(f"--launch: unknown {name!r}; known: {known}, or --deepspeed FILE")
    if processes < 1:
        faults.append(f"--processes is {processes}: it must be at least 1")
    if name.startswith("zero") or name == OWN_FILE:
        faults += missing_package(name if name == OWN_FILE else f"--launch {name}", "deepspeed", "vlmr1[scale]")
    if faults:
        raise SettingError("\n".join(faults))
    environment = dict(LAUNCHES[name])
    if not torch.cuda.is_available():
        more, flags = on_cpu(name)
        environment, arguments = environment | more, [*arguments, *flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *SIGNALS]
    return environment, [sys.executable, *torchrun, "-m", "vlmr1.cli", command, *arguments]


def on_cpu(name: str) -> tuple[dict[str, str], list[str]]:
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


def default_processes() -> int:
    """Return one process per GPU."""
    return torch.cuda.device_count() or 1


def launch(environment: Mapping[str, str], command: list[str]) -> NoReturn:
    """Print a launch command and replace this process by it."""
    words = [f"{key}={shlex.quote(value)}" for key, value in environment.items()]
    print(" ".join([*words, *map(shlex.quote, command)]), flush=True)
    os.execvpe(command[0], command, os.environ | environment)


def launch_name() -> str:
    """Return the name of the engine that this process was launched with, as for --launch."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp2"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return engine_of_environment()
    return "ddp"
