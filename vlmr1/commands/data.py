"""`vlmr1 data`: check data files, or rate their rows by a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmr1.commands import data_check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    data_check.add_arguments(actions.add_parser("check", help="every fault, by file and line"))
    parser = actions.add_parser(
        "rate",
        help="pass rate and mean reward of each row, from completions that a model samples",
        description="Sample num_generations completions of each row and write the rows with their pass rates.",
        epilog="Model, data, rewards and rollout are set as in `vlmr1 train`, which lists these settings.",
        allow_abbrev=False,
    )
    parser.set_defaults(takes_settings=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="one directory a model is written there")
    parser.add_argument("--pass_reward", help="reward that decides; default: accuracy, or the only one")
    parser.add_argument("--pass_threshold", type=float, default=0.5, help="a completion passes with at least this")
    parser.add_argument("--pictures", type=int, default=12, help="best and worst rows in the report, as many of each")
    parser.add_argument("--recipe", help="a recipe shipped with the package")
    parser.add_argument("--config", type=Path, help="a YAML file of settings")


def run(options: argparse.Namespace, rest: list[str]) -> int | None:
    if options.action == "check":
        return data_check.run(options, rest)
    from vlmr1.commands import data_rate  # imports the trainer, which a check does not need

    data_rate.run(options, rest)
    return None
