"""The command lines of `train` and `sft`: settings, all that is wrong or missing in one message, and the launch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vlmr1.commands.arguments import Kind, make_config, read_settings, show_help
from vlmr1.config import GRPOConfig
from vlmr1.data.sources import split_names
from vlmr1.distributed.deepspeed_file import read_deepspeed, use_deepspeed
from vlmr1.distributed.launch import OWN_FILE, default_processes, launch, launch_command, on_cpu
from vlmr1.errors import faults_of
from vlmr1.lifecycle.disk import check_output_dir

# Options that are no settings: the sources of settings; an engine; its number of processes, by default one a GPU.
OPTIONS: dict[str, type] = {"recipe": str, "config": Path, "launch": str, "processes": int}
FILES = (".json", ".jsonl", ".parquet", ".yaml", ".yml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the help; other options are read with the settings, so that all faults are reported together."""
    parser.add_argument("-h", "--help", nargs="?", const="", metavar="SETTING", help="all settings, or one in full")


def start(asked: argparse.Namespace, words: list[str], kind: Kind = GRPOConfig) -> Any:
    """Return the settings of a run of this process. With `--launch`, and with `--deepspeed FILE` outside of a launch,
    start its processes in place of this one. None where only the help was asked for."""
    if asked.help is not None:
        show_help(asked.help, kind)
        return None
    options, rest, faults = _read_options(words)
    settings, more = read_settings(rest, recipe=options["recipe"], config=options["config"], kind=kind)
    faults += faults_of(lambda: check_output_dir(Path(settings.get("output_dir") or kind.output_dir or "")))
    faults += [*more, *missing_inputs(settings)]
    file, engine = settings.pop("deepspeed", None), options["launch"]
    if file is not None:
        bf16 = bool(settings.get("bf16"))
        use = use_deepspeed if _is_launched() else dict
        faults += faults_of(lambda: use(read_deepspeed(file, bf16=bf16)))
        if engine is not None:
            faults.append(f"--launch {engine} and --deepspeed {file} are both given: give one of them")
        elif not _is_launched():
            engine = OWN_FILE
        elif not torch.cuda.is_available():
            variables, _ = on_cpu(OWN_FILE)
            os.environ |= variables
            settings.setdefault("ddp_backend", "gloo")
    if engine is None and options["processes"] is not None:
        faults.append("--processes has no effect without --launch or --deepspeed")
    if engine is None:
        return make_config(settings, faults, preflight=True, kind=kind)
    sources = [word for name in ("recipe", "config") if options[name] for word in (f"--{name}", str(options[name]))]
    commands: list[Any] = []
    count = default_processes() if options["processes"] is None else options["processes"]
    faults += faults_of(lambda: commands.append(launch_command(engine, count, [*sources, *rest], kind.command)))
    on_this_machine = {} if torch.cuda.is_available() else {"use_cpu": True}
    make_config(settings | on_this_machine, faults, preflight=True, kind=kind)  # once, not in each process
    launch(*commands[0])


def _read_options(words: list[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the options of the command itself, the words of settings, and the faults of the options."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in OPTIONS:
        parser.add_argument(f"--{name}", action="append", nargs="?", default=[])
    given, rest = parser.parse_known_args(words)
    options: dict[str, Any] = {name: (values or [None])[0] for name, values in vars(given).items()}
    faults: list[str] = []
    for name, values in vars(given).items():
        if None in values:
            faults.append(f"--{name} has no value")
        elif len(set(values)) > 1:
            faults.append(f"{name} is given twice: {' and '.join(dict.fromkeys(values))}")
    for name, kind in OPTIONS.items():
        try:
            options[name] = None if options[name] is None else kind(options[name])
        except ValueError:
            faults.append(f"--{name} is {options[name]!r}: a number is expected")
            options[name] = None
    return options, rest, faults


def missing_inputs(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the files and directories that settings name and that do not exist. Hub ids are not looked up."""
    model = settings.get("model_name_or_path") or ""
    if model.startswith(("/", "./", "../", "~")) and not Path(model).exists():
        yield f"model_name_or_path: {model} does not exist"
    elif "internvl" in model.lower() and not model.endswith("-hf") and not Path(model).exists():
        yield (
            f"model_name_or_path: {model} runs code of its own; give a checkpoint whose name ends in -hf, such as "
            "OpenGVLab/InternVL3-2B-hf"
        )
    for name in ("data_file_paths", "eval_data_file_paths"):
        for file in dict.fromkeys(split_names(settings.get(name) or [])):
            path = Path(file.partition("@")[0])
            if (path.is_absolute() or path.suffix in FILES) and not path.exists():
                yield f"{name}: {file} does not exist"
    for name in ("image_folders", "eval_image_folders"):
        for folder in dict.fromkeys(split_names(settings.get(name) or [])):
            if not Path(folder).exists():
                yield f"{name}: {folder} does not exist"


def _is_launched() -> bool:
    """Return whether torchrun, or a launcher that sets its variables, started this process."""
    return "RANK" in os.environ
