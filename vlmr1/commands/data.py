"""`vlmr1 data`: check data files, or rate their rows by a model."""

from __future__ import annotations

import argparse

from vlmr1.commands import data_check, data_rate

ACTIONS = {"check": data_check, "rate": data_rate}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    data_check.add_arguments(actions.add_parser("check", help="every fault, by file and line"))
    rate = actions.add_parser(
        "rate",
        help="pass rate and mean reward of each row, from completions that a model samples",
        description="Sample num_generations completions of each row and write the rows with their pass rates.",
        epilog="Model, data, rewards and rollout are set as in `vlmr1 train`, which lists these settings.",
        allow_abbrev=False,
    )
    data_rate.add_arguments(rate)
    rate.set_defaults(takes_settings=True)


def run(options: argparse.Namespace, rest: list[str]) -> int | None:
    return ACTIONS[options.action].run(options, rest)
