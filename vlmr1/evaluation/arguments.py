"""The command line of `vlmr1 evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_args

from vlmr1.data.box_coordinates import Setting
from vlmr1.errors import SettingError
from vlmr1.evaluation.options import DTYPES, LENGTH_OF, TASKS, TEMPLATE_OF, Options
from vlmr1.evaluation.outputs import OutputOptions
from vlmr1.rewards.judge import Judge
from vlmr1.rollout import ENGINES


@dataclass(frozen=True)
class Evaluate:
    """`vlmr1 evaluate --model ...`"""

    models: list[str]
    options: Options
    output: OutputOptions
    ddp_timeout: float


@dataclass(frozen=True)
class Compare:
    """`vlmr1 evaluate compare DIR ...`"""

    folders: list[Path]
    out: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingError(f"{self.prog.partition(' ')[2]}: {message}")


def parse(words: Sequence[str]) -> Evaluate | Compare:
    """Parse the words after `vlmr1 evaluate`. SettingError for an invalid one."""
    if words[:1] == ["compare"]:
        options = _compare_parser().parse_args(words[1:])
        return Compare(options.folders, options.out)
    options = _parser().parse_args(words)
    for name in ("pictures", "reward_workers"):
        if getattr(options, name) < 0:
            raise SettingError(f"--{name} is {getattr(options, name)}: it must not be negative")
    for name in ("reward_timeout", "ddp_timeout"):
        if not getattr(options, name) > 0:
            raise SettingError(f"--{name} is {getattr(options, name)}: it must be above 0")
    if options.max_completion_length is not None and options.max_completion_length < 1:
        raise SettingError(f"--max_completion_length is {options.max_completion_length}: it must be at least 1")
    return Evaluate(options.model, _options(options), _output(options), options.ddp_timeout)


def _options(options: argparse.Namespace) -> Options:
    same = ("task", "limit", "batch_size", "box_coordinates", "prompt_column", "solution_column", "revision")
    same += ("trust_remote_code", "dtype", "rollout_engine", "kernels", "question_template")
    return Options(
        data=tuple(options.data),
        images=tuple(options.images),
        accu_reward_method=tuple(options.accu_reward_method),
        judge=_judge(options),
        max_completion_length=options.max_completion_length or 0,
        **{name: getattr(options, name) for name in same},
    )


def _judge(options: argparse.Namespace) -> Judge | None:
    if options.judge_url is None:
        if options.judge_model is not None:
            raise SettingError("--judge_model needs --judge_url")
        return None
    return Judge(
        options.judge_url,
        options.judge_model or "",
        timeout=options.judge_timeout,
        retries=options.judge_retries,
        concurrency=options.judge_concurrency,
    )


def _output(options: argparse.Namespace) -> OutputOptions:
    return OutputOptions(
        options.output_dir, options.pictures, options.use_cpu, options.reward_workers, options.reward_timeout
    )


def _parser() -> _Parser:
    parser = _Parser(
        prog="vlmr1 evaluate",
        allow_abbrev=False,
        description="Greedy evaluation of checkpoints; `vlmr1 evaluate compare DIR ...` compares results.",
    )
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="local directories, hub ids, or tiny; several are compared")
    add("--task", required=True, choices=TASKS, help="one box; boxes with labels; answers in words")
    add("--data", nargs="+", required=True, help="data files as in training, RefCOCO JSON, COCO annotation JSON")
    add("--images", nargs="*", default=[], help="image folders: one for each data file, or one for all")
    add("--output_dir", type=Path, required=True, help="one directory a model is written there")
    add("--question_template", default="", help=f"default: {_by_task(TEMPLATE_OF)}")
    add("--box_coordinates", default="auto", choices=get_args(Setting), help="in which the model writes boxes")
    add("--max_completion_length", type=int, help=f"tokens; default: {_by_task(LENGTH_OF)}")
    add("--batch_size", type=int, default=32, help="rows that are decoded together")
    add("--limit", type=int, help="evaluate the first rows only")
    add("--accu_reward_method", nargs="+", default=[], help="of vqa: one, or one for each file; a row's column wins")
    add("--judge_url", help="OpenAI-compatible API of accu_reward_method llm")
    add("--judge_model")
    add("--judge_timeout", type=float, default=60.0, help="seconds a request")
    add("--judge_retries", type=int, default=3)
    add("--judge_concurrency", type=int, default=8)
    add("--prompt_column", default="prompt", help="of rows in TRL's format")
    add("--solution_column", default="solution", help="of rows in TRL's format")
    add("--revision", default="main", help="of a hub model")
    add("--trust_remote_code", action="store_true", help="run code that a hub model ships")
    add("--dtype", default="float32", choices=DTYPES, help="of weights and computation")
    add("--rollout_engine", default="native", choices=tuple(ENGINES))
    add("--kernels", default="", help="op=impl,... ; see `vlmr1 doctor`")
    add("--use_cpu", action="store_true", help="leave a GPU alone")
    add("--pictures", type=int, default=12, help="best and worst cases on the page, as many of each")
    add("--reward_workers", type=int, default=2, help="processes for scores that may hang; 0: none, no time limit")
    add("--reward_timeout", type=float, default=10.0, help="seconds a completion, in those processes")
    add("--ddp_timeout", type=float, default=1800.0, help="seconds that processes wait for each other")
    return parser


def _compare_parser() -> _Parser:
    parser = _Parser(prog="vlmr1 evaluate compare", allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, help="directories with results.json, or with such in them")
    parser.add_argument("--out", type=Path, help="Markdown file; default: comparison.md in the first directory")
    return parser


def _by_task(values: dict) -> str:
    return ", ".join(f"{task}: {value}" for task, value in values.items())
