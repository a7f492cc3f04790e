"""vlmr1 demo | train | plan | evaluate | data | doctor."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmr1.data.check import add_arguments, check_command
from vlmr1.errors import UserError
from vlmr1.memory.plan_arguments import add_arguments as add_plan_arguments
from vlmr1_kernels.registry import ImplementationError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the user's mistakes are one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="vlmr1", description="GRPO for vision-language models.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train the embedded tiny model and report before and after")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--output_dir", type=Path, help="default: output/demo-SEED")
    train = commands.add_parser("train", help="GRPO on your model and data", add_help=False, allow_abbrev=False)
    train.add_argument("--recipe", help="a recipe shipped with the package")
    train.add_argument("--config", type=Path, help="a YAML file of settings")
    train.add_argument("-h", "--help", action="store_true")
    plan = commands.add_parser("plan", help="peak memory of a training job by cause, before anything is loaded")
    add_plan_arguments(plan)
    evaluate = commands.add_parser("evaluate", help="greedy acc@0.5 and mean IoU of a checkpoint")
    evaluate.add_argument("--model", required=True, help="local directory, hub id, or tiny")
    evaluate.add_argument("--data", required=True, type=Path, help="JSONL file")
    evaluate.add_argument("--images", required=True, type=Path, help="image folder")
    evaluate.add_argument("--question_template", default="rec")
    evaluate.add_argument("--max_completion_length", type=int, default=256)
    evaluate.add_argument("--batch_size", type=int, default=32)
    evaluate.add_argument("--out", type=Path, help="JSONL file for the completions")
    data = commands.add_parser("data", help="check data files before training")
    check = data.add_subparsers(dest="action", required=True).add_parser("check", help="every fault, by file and line")
    add_arguments(check)
    commands.add_parser("doctor", help="what this machine has, and which kernels it would use")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("train", "demo", "plan"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        return _run(options, rest)
    except (UserError, ImplementationError) as error:
        print(f"vlmr1: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    if options.command == "doctor":
        from vlmr1.doctor import doctor

        print(doctor())
        return 0
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if options.command == "demo":
        from vlmr1.demo import demo

        demo(options.seed, options.output_dir or Path("output") / f"demo-{options.seed}", rest)
    elif options.command == "train":
        from vlmr1.arguments import help_text, parse_config
        from vlmr1.run import train

        if options.help:
            print(help_text())
        else:
            train(parse_config(rest, recipe=options.recipe, config=options.config))
    elif options.command == "plan":
        from vlmr1.memory.plan_command import plan_command

        plan_command(options, rest)
    elif options.command == "evaluate":
        from vlmr1.evaluation.command import evaluate_command

        evaluate_command(options)
    elif options.command == "data":
        return check_command(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
