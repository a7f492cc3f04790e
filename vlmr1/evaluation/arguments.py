"""The command line of `vlmr1 evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from vlmr1.errors import SettingError
from vlmr1.evaluation.options import Options
from vlmr1.evaluation.outputs import OutputOptions


@dataclass(frozen=True)
class Evaluate:
    """`vlmr1 evaluate --model ...`"""

    models: list[str]
    options: Options
    output: OutputOptions


@dataclass(frozen=True)
class Compare:
    """`vlmr1 evaluate compare DIR ...`"""

    folders: list[Path]
    out: Path | None


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{self.prog.partition(' ')[2]}: {message}")


def parse(words: Sequence[str]) -> Evaluate | Compare:
    """Parse the words after `vlmr1 evaluate`. SettingError for an invalid one."""
    if words[:1] == ["compare"]:
        given = _compare_parser().parse_args(words[1:])
        return Compare(given.folders, given.out)
    given = _parser().parse_args(words)
    options, output = (kind(**{each.name: getattr(given, each.name) for each in fields(kind)}) for kind in KINDS)
    return Evaluate(given.model, options, output)


KINDS: Any = (Options, OutputOptions)
HELP = "Greedy evaluation of checkpoints; `vlmr1 evaluate compare DIR ...` compares results."


def _parser() -> _Parser:
    options: Any = {"allow_abbrev": False, "formatter_class": argparse.HelpFormatter}
    parser = _Parser(KINDS, prog="vlmr1 evaluate", description=HELP, **options)
    about = "local directories, hub ids, or tiny; several are compared"
    parser.add_argument("--model", nargs="+", required=True, help=about)
    return parser


def _compare_parser() -> _Parser:
    parser = _Parser(prog="vlmr1 evaluate compare", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, help="directories with results.json, or with such in them")
    parser.add_argument("--out", type=Path, help="Markdown file; default: comparison.md in the first directory")
    return parser
