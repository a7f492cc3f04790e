"""Result files: what a benchmark wrote, read back and held against the layout before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmr1.errors import UserError

LAYOUT = 1
Result = Mapping[str, Any]

_TOP = ("machine", "versions", "commit", "command", "date", "figures")
_FIGURES = ("device", "threads", "quick", "shape", "dtype", "sizes", "rounds", "warmup", "ceilings", "sections")
_SIZES = ("prompts", "num_generations", "image_tokens", "prompt_tokens", "completion_tokens", "parameters")
_ARM = ("label", "group", "base", "settings", "seconds", "tokens")
_CELL = ("num_generations", "prompt_tokens", "completion_tokens", "seconds", "ratio", "predicted")
_OP_ARM = ("median_ms", "ceiling_share")
TIMED = ("rollout", "update", "step")  # sections of arms
OPS = ("ops", "attention")  # sections of op cases


class ResultError(UserError):
    """A file that is not what it should be; the message starts with its name."""


def read_any(path: Path) -> dict[str, Any]:
    """A result file of any benchmark: who, where, when, and its figures."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # bytes that are no text, text that is no JSON
        raise ResultError(f"{path}: not JSON: {error}") from None
    _need(path, "the file", result, _TOP)
    return result


def read(path: Path) -> dict[str, Any]:
    """A result of the suite."""
    result = read_any(path)
    figures = result["figures"]
    if not isinstance(figures, dict) or "suite" not in figures:
        raise ResultError(f"{path}: not a result of the suite (its figures have no 'suite')")
    if figures["suite"] != LAYOUT:
        raise ResultError(f"{path}: layout {figures['suite']!r} of the suite; this reads layout {LAYOUT}")
    _need(path, "figures", figures, _FIGURES)
    _need(path, "figures/sizes", figures["sizes"], _SIZES)
    _need(path, "figures/ceilings", figures["ceilings"], ("copy_gb_s", "matmul_tflop_s"))
    for name, section in figures["sections"].items():
        where = f"sections/{name}"
        if name in OPS:
            _cases(path, where, section)
        elif name in TIMED:
            _arms(path, where, section)
        elif name == "memory":
            _memory(path, where, section)
        else:
            raise ResultError(f"{path}: {where} is not a section of layout {LAYOUT}")
    return result


def unfinished(result: Result) -> str | None:
    """What a run that was stopped did not bring to its end; None for a complete one, as those of old files are."""
    figures = result["figures"]
    if figures.get("complete", True):
        return None
    return f"stopped before its end: not complete are {', '.join(figures.get('unfinished', []))}"


def _cases(path: Path, where: str, section: Any) -> None:
    _need(path, where, section, ())
    for key, case in section.items():
        _need(path, f"{where}/{key}", case, ("op", "case", "arms", "seconds"))
        for name, row in case["arms"].items():
            _need(path, f"{where}/{key}/{name}", row, _OP_ARM)
        _rounds(path, f"{where}/{key}", case["seconds"])


def _arms(path: Path, where: str, section: Any) -> None:
    _need(path, where, section, ("arms",))
    arms = section["arms"]
    for name, arm in arms.items():
        _need(path, f"{where}/{name}", arm, _ARM)
        if arm["base"] not in arms:
            raise ResultError(f"{path}: {where}/{name} has the base {arm['base']!r}, which is no arm of {where}")
    _rounds(path, where, {name: arm["seconds"] for name, arm in arms.items()})
    for number, cell in enumerate(section.get("grid", [])):
        here = f"{where}/grid[{number}]"
        _need(path, here, cell, _CELL)
        _need(path, f"{here}/ratio", cell["ratio"], ("value", "low", "high"))
        _need(path, f"{here}/seconds", cell["seconds"], ("naive", "all"))
        _rounds(path, here, cell["seconds"])


def _memory(path: Path, where: str, section: Any) -> None:
    _need(path, where, section, ("arms",))
    for name, arm in section["arms"].items():
        _need(path, f"{where}/{name}", arm, ("label", "peak_mib", "phases", "timeline"))


def _need(path: Path, where: str, value: Any, keys: Iterable[str]) -> None:
    if not isinstance(value, dict):
        raise ResultError(f"{path}: {where} is not an object")
    missing = [key for key in keys if key not in value]
    if missing:
        raise ResultError(f"{path}: {where} has no {', '.join(missing)}")


def _rounds(path: Path, where: str, seconds: Mapping[str, Any]) -> None:
    """Positive samples, as many of each arm: sample i is of round i."""
    for name, times in seconds.items():
        listed = times if isinstance(times, list) else []
        if not listed or not all(isinstance(each, (int, float)) and each > 0 for each in listed):  # no NaN either
            raise ResultError(f"{path}: seconds of {where}/{name} are not positive numbers")
    counts = {len(times) for times in seconds.values()}
    if len(counts) > 1:
        raise ResultError(f"{path}: arms of {where} have {sorted(counts)} samples; sample i is to be of round i")
