"""vlmr1 demo | train | sft | plan | evaluate | report | merge | data | doctor | bench."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from vlmr1.errors import Stopped, UserError
from vlmr1.lifecycle.console import print_fatal, quiet_imports, redirect_broken_streams
from vlmr1.lifecycle.processes import exit_process
from vlmr1_kernels.registry import ImplementationError

COMMANDS = {  # module below commands/, help
    "demo": ("demo", "train the embedded tiny model and report before and after"),
    "train": ("train", "GRPO on your model and data"),
    "sft": ("sft", "supervised fine-tuning on your rows, for example as a cold start of GRPO"),
    "plan": ("plan", "peak memory of a training job by cause, before anything is loaded"),
    "evaluate": ("evaluate", "greedy evaluation of checkpoints, and its comparison"),
    "report": ("report", "one HTML page of a training run, also while it goes on, or of several runs"),
    "merge": ("merge", "a checkpoint with an adapter -> an ordinary model directory"),
    "data": ("data", "check data files before training, or rate their rows by a model"),
    "doctor": ("doctor", "what this machine has, and which kernels it would use"),
    "bench": ("bench", "what is gained on this machine, and by which switch"),
}
RUNS = ("train", "sft")
OWN_HELP = (*RUNS, "evaluate", "bench")  # they print their help themselves
TAKE_MORE = (*OWN_HELP, "demo", "plan")  # words that the command reads itself: settings
NO_MODEL = ("doctor", "bench")  # they do not need transformers


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the user's mistakes are on stderr, with exit status 2; signals have 128 + their number."""
    quiet_imports()
    try:  # around the import of the command too, which takes seconds
        command, options, rest = _parse(arguments)
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        if options.command not in NO_MODEL:
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        return command.run(options, rest) or 0
    except (UserError, ImplementationError) as error:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print_fatal(f"{rank}{error}")
        if rank:
            os._exit(2)  # the other ranks wait for this one in a collective: it must not wait for them
        return 2
    except Stopped as stopped:
        print_fatal(str(stopped))
        return stopped.status
    except KeyboardInterrupt:
        print_fatal("stopped by Ctrl-C")
        return 128 + signal.SIGINT
    finally:
        redirect_broken_streams()  # else Python fails where it flushes the streams at exit


def _parse(arguments: Sequence[str] | None) -> tuple[ModuleType, argparse.Namespace, list[str]]:
    """The command's module, its options, and the words that it reads itself. Other commands are not imported."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="vlmr1", description="GRPO for vision-language models.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    module = ModuleType("none")
    for name, (file, text) in COMMANDS.items():
        each = commands.add_parser(name, help=text, add_help=name not in OWN_HELP, allow_abbrev=name not in RUNS)
        if words[:1] == [name]:
            module = import_module(f"vlmr1.commands.{file}")
            if hasattr(module, "add_arguments"):  # else it has none, or parses its own
                module.add_arguments(each)
    try:
        options, rest = parser.parse_known_args(words)
        if rest and options.command not in TAKE_MORE and not hasattr(options, "takes_settings"):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except BrokenPipeError:  # nobody reads the help to its end
        redirect_broken_streams()
        raise SystemExit(0) from None
    finally:
        redirect_broken_streams()
    return module, options, rest


def command() -> NoReturn:
    """`vlmr1`"""
    exit_process(main())


if __name__ == "__main__":
    command()
