"""Arms called in turn, medians and their ratios, peak memory, and the file that keeps the figures."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

MIB = 2**20
RESULTS = Path(__file__).parent / "results"


class CheckFailed(Exception):
    """The arms do not compute the same thing: there is nothing to compare."""


@dataclass(frozen=True)
class Ratio:
    """Median of one arm over median of another, with the lowest and highest ratio of any one round."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f}..{self.high:.2f})"


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """`function` as an arm: a call returns its seconds, the device's work included."""

    def arm() -> float:
        _synchronize()
        start = perf_counter()
        function()
        _synchronize()
        return perf_counter() - start

    return arm


def alternate(arms: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each arm, called in turn, `warmup` rounds unmeasured.

    Every second round is in reverse order, so that no arm always follows the same one."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: it must be at least 1")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-warmup, rounds):
        for name in list(arms) if number % 2 == 0 else reversed(list(arms)):
            measured = arms[name]()
            if number >= 0:
                seconds[name].append(measured)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], numerator: str, denominator: str) -> Ratio:
    """How many times as long one arm takes as another."""
    above, below = seconds[numerator], seconds[denominator]
    by_round = [a / b for a, b in zip(above, below, strict=True)]
    return Ratio(median(above) / median(below), min(by_round), max(by_round))


def require_equal(figures: Mapping[str, Mapping[str, float]], tolerance: float = 1e-4) -> None:
    """CheckFailed unless every figure of every arm is within `tolerance`, relative, of the first arm's."""
    (first, expected), *others = figures.items()
    for name, values in others:
        if values.keys() != expected.keys():
            raise CheckFailed(f"{name} reports {sorted(values)}, {first} reports {sorted(expected)}")
        for figure, value in values.items():
            wanted = expected[figure]
            if not abs(value - wanted) <= tolerance * abs(wanted):  # a NaN fails too
                raise CheckFailed(f"{figure} is {value!r} in {name} and {wanted!r} in {first}: nothing is timed")


class PeakMemory:
    """What a process needs beyond what it held when this was made.

    On a GPU: the most bytes that torch has allocated, less those allocated at the start. On Linux without
    one: the highest resident set (VmHWM of /proc/self/status), less the resident set at the start (VmRSS).
    The kernel's high-water mark is reset at the start through /proc/self/clear_refs; where that is not
    allowed, the growth of the mark is taken instead, a lower bound.
    """

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_initialized()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / MIB
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.reset = True
        except OSError:
            self.reset = False
        self.start = _status_mib("VmRSS" if self.reset else "VmHWM")

    def mib(self) -> float:
        """Peak since the start, above what was held then, in MiB."""
        peak = torch.cuda.max_memory_allocated() / MIB if self.cuda else _status_mib("VmHWM")
        return peak - self.start


def _status_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1]) / 1024  # the kernel's kB are KiB
    raise OSError(f"/proc/self/status has no {name}")


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def machine() -> str:
    """Name of the GPU, or of the processor with the number of its cores that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of `packages`, and of CUDA; those that are absent are left out."""
    installed = {each.name.lower().replace("_", "-"): each.version for each in metadata.distributions() if each.name}
    found = {name: installed[name] for name in sorted(packages) if name in installed}
    cuda = {"cuda": str(torch.version.cuda)} if torch.cuda.is_available() else {}
    return {"python": platform.python_version()} | found | cuda


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"

    return "\n".join(map(line, (head, rule, *rows)))


def commit(result: Path | None = None, within: Path = Path(__file__).parent) -> str:
    """The commit that is checked out around `within`, with "+" where files differ from it; "unknown" outside a
    repository. What a run writes is no such file: `result` itself, and what is untracked in its folder, where that is
    not the repository's own."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=within, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None

    head, root = git("rev-parse", "--short", "HEAD"), git("rev-parse", "--show-toplevel")
    if head is None or root is None:
        return "unknown"
    top = Path(root.strip()).resolve()
    own = result.resolve() if result is not None else None

    def counts(status: str, path: Path) -> bool:
        if own is None:
            return True
        beside = own.parent in path.parents and own.parent != top
        return path != own and not (status == "??" and beside)

    listed = (git("status", "--porcelain", "--no-renames", "--untracked-files=all", "-z") or "").split("\0")
    changed = any(counts(line[:2], top / line[3:]) for line in listed if line)
    return head.strip() + ("+" if changed else "")


def write_result(path: Path, figures: Mapping[str, Any]) -> Path:
    """Write figures with machine, versions, commit, command and date as JSON: the whole file, or none."""
    result = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(path),
        "command": " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": {name: asdict(value) if isinstance(value, Ratio) else value for name, value in figures.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.part")
    try:
        half.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    return path
