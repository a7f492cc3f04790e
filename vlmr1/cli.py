"""vlmr1 demo | train | plan | evaluate | report | merge | data | doctor | bench."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vlmr1.commands.data_check import add_arguments, check_command
from vlmr1.commands.plan import add_arguments as add_plan_arguments
from vlmr1.errors import Stopped, UserError
from vlmr1.lifecycle.console import last_words
from vlmr1.lifecycle.processes import leave
from vlmr1_kernels.registry import ImplementationError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the user's mistakes are one line on stderr and exit status 2, signals 128 + their number."""
    parser = argparse.ArgumentParser(prog="vlmr1", description="GRPO for vision-language models.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train the embedded tiny model and report before and after")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--output_dir", type=Path, help="default: output/demo-SEED")
    train = commands.add_parser("train", help="GRPO on your model and data", add_help=False, allow_abbrev=False)
    train.add_argument("--recipe", help="a recipe shipped with the package")
    train.add_argument("--config", type=Path, help="a YAML file of settings")
    train.add_argument("--launch", help="start one process a GPU: ddp, fsdp2, zero2, zero3 or zero3-offload")
    train.add_argument("--processes", type=int, help="of --launch; default: one a GPU")
    train.add_argument("-h", "--help", action="store_true")
    plan = commands.add_parser("plan", help="peak memory of a training job by cause, before anything is loaded")
    add_plan_arguments(plan)
    commands.add_parser("evaluate", help="greedy evaluation of checkpoints, and its comparison", add_help=False)
    merge = commands.add_parser("merge", help="a checkpoint with an adapter -> an ordinary model directory")
    merge.add_argument("--checkpoint", required=True, type=Path)
    merge.add_argument("--output", required=True, type=Path, help="a directory that does not exist")
    merge.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")
    data = commands.add_parser("data", help="check data files before training")
    check = data.add_subparsers(dest="action", required=True).add_parser("check", help="every fault, by file and line")
    add_arguments(check)
    commands.add_parser("doctor", help="what this machine has, and which kernels it would use")
    commands.add_parser("bench", help="what is gained on this machine, and by which switch", add_help=False)
    report = commands.add_parser("report", help="one HTML page of a training run, which may still be running")
    report.add_argument("run", type=Path, help="the run's output_dir")
    report.add_argument("--out", type=Path, help="default: training.html in it")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("train", "demo", "evaluate", "plan", "bench"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return _run(options, rest)
    except (UserError, ImplementationError) as error:
        rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        last_words(f"{rank}{error}")
        if rank:
            os._exit(2)  # the other ranks wait for this one in a collective: it must not wait for them
        return 2
    except Stopped as stopped:
        last_words(str(stopped))
        return stopped.status
    except KeyboardInterrupt:
        last_words("stopped by Ctrl-C")
        return 128 + signal.SIGINT


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    if options.command == "train" and options.launch is not None and not options.help:
        from vlmr1.distributed.launch import launch

        chosen = {"--recipe": options.recipe, "--config": options.config}
        given = [word for name, value in chosen.items() if value is not None for word in (name, str(value))]
        launch(options.launch, options.processes, [*given, *rest])
    if options.command == "bench":
        from vlmr1.commands.bench import bench

        bench(rest)
    if options.command == "doctor":
        from vlmr1.commands.doctor import doctor

        print(doctor())
        return 0
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if options.command == "demo":
        from vlmr1.commands.demo import demo

        demo(options.seed, options.output_dir or Path("output") / f"demo-{options.seed}", rest)
    elif options.command == "train":
        from vlmr1.commands.arguments import help_text, parse_config
        from vlmr1.commands.train import train

        if options.help:
            print(help_text())
        else:
            train(parse_config(rest, recipe=options.recipe, config=options.config))
    elif options.command == "plan":
        from vlmr1.commands.plan import plan_command

        plan_command(options, rest)
    elif options.command == "evaluate":
        from vlmr1.commands.evaluate import evaluate_command

        evaluate_command(rest)
    elif options.command == "report":
        from vlmr1.report.training import write_run_report

        print(write_run_report(options.run, options.out))
    elif options.command == "merge":
        from vlmr1.commands.merge import merge

        merge(options.checkpoint, options.output, dtype=options.dtype)
    elif options.command == "data":
        return check_command(options)
    return 0


def command() -> NoReturn:
    """`vlmr1`"""
    leave(main())


if __name__ == "__main__":
    command()
