"""The clock, alternation of arms, peak memory, and the result file.

A sample on a CPU is one call by the clock of `torch.utils.benchmark`. On CUDA it is timed as
`triton.testing.do_bench` does it: the L2 cache is overwritten, then events are recorded before and after the call.
"""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.benchmark.utils.timer import timer

from vlmr1.errors import UserError

MIB = 2**20
LAYOUT = 2  # of result files
FLUSH_BYTES = 256 * MIB  # several times the largest L2 cache
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")

Clock = Callable[[Callable[[], Any]], float]  # a function -> seconds of one call


class CheckFailed(Exception):
    """Arms compute different things, so that there is nothing to compare."""


def cpu_clock(function: Callable[[], Any]) -> float:
    """Seconds of one call by the clock of `torch.utils.benchmark`, whose `Timer` would make two more calls."""
    start = timer()
    function()
    return timer() - start


def clock_of(device: str) -> Clock:
    """Return the clock of a device; that of CUDA overwrites the cache first."""
    if device != "cuda":
        return cpu_clock
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def clock(function: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def alternate(
    arms: Mapping[str, Callable[[], float]], *, rounds: int, samples: Any = None, before: Any = None
) -> dict[str, list[float]]:
    """Call the arms in turn and return the seconds of each; `samples`, a dict, is filled as they come.

    Every second round runs in reverse order, so that no arm always follows the same one. `before` is called with the
    arm's name and the number of the round, from 1."""
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}: it must be at least 1")
    samples = {} if samples is None else samples
    for number in range(1, rounds + 1):
        for name in list(arms) if number % 2 else reversed(list(arms)):
            if before is not None:
                before(name, number)
            samples.setdefault(name, []).append(arms[name]())
    return samples


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over median."""
    return median(above) / median(below)


def require_equal(figures: Mapping[str, Mapping[str, float]], tolerance: float, **floor: float) -> None:
    """Raise CheckFailed unless every arm's figures are within a relative `tolerance` of the first arm's; `floor` has
    absolute differences that are always allowed, by figure."""
    (first, expected), *others = figures.items()
    for name, values in others:
        if values.keys() != expected.keys():
            raise CheckFailed(f"{name} reports {sorted(values)}, {first} reports {sorted(expected)}")
        for figure, value in values.items():
            allowed = max(tolerance * abs(expected[figure]), floor.get(figure, 0.0))
            if not abs(value - expected[figure]) <= allowed:  # a NaN fails too
                raise CheckFailed(f"{figure} is {value!r} in {name} and {expected[figure]!r} in {first}")


class PeakMemory:
    """Peak memory of this process beyond what it holds when this is made.

    On CUDA: bytes that torch allocates. On Linux otherwise: the resident set, after free memory was returned to the
    system (VmHWM of /proc/self/status, set back through clear_refs). Elsewhere nothing is known."""

    def __init__(self, status: Path = Path("/proc/self/status")) -> None:
        gc.collect()
        self.status = status
        self.cuda = torch.cuda.is_initialized()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start: float | None = torch.cuda.memory_allocated() / MIB
            return
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        if libc is not None and hasattr(libc, "malloc_trim"):  # glibc: free memory goes back to the system
            libc.malloc_trim(0)
        try:
            status.with_name("clear_refs").write_text("5")
            self.start = status_mib(status, "VmRSS")
        except (OSError, KeyError):
            self.start = None

    def mib(self) -> float | None:
        """MiB above the start; None where it cannot be known."""
        if self.start is None:
            return None
        peak = torch.cuda.max_memory_allocated() / MIB if self.cuda else status_mib(self.status, "VmHWM")
        return peak - self.start


def status_fields(status: Path) -> dict[str, str]:
    """Return the fields of a status file of /proc; none where the process has ended."""
    try:
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def status_mib(status: Path, field: str) -> float:
    return float(status_fields(status)[field].split()[0]) / 1024  # its kB are KiB


# Result files


def machine() -> str:
    """Return the name of the GPU, or of the processor with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = status_fields(Path("/proc/cpuinfo")).get("model name\t", platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Return the versions of Python, of the installed `PACKAGES`, and of CUDA."""
    installed = {each.name.lower().replace("_", "-"): each.version for each in metadata.distributions() if each.name}
    found = {name: installed[name] for name in sorted(PACKAGES) if name in installed}
    cuda = {"cuda": str(torch.version.cuda)} if torch.cuda.is_available() else {}
    return {"python": platform.python_version()} | found | cuda


def commit(within: Path = Path(__file__).parent) -> str:
    """Return the commit that is checked out, with "+" where tracked files differ from it."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=within, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    head = git("rev-parse", "--short", "HEAD")
    return head + ("+" if changed else "") if head else "unknown"


def write_result(path: Path, kind: str, figures: Mapping[str, Any]) -> Path:
    """Write figures with machine, versions, commit, command and date as JSON: the whole file, or none."""
    about = {"kind": kind, "layout": LAYOUT, "machine": machine(), "versions": versions(), "commit": commit()}
    about |= {"command": shlex.join(["python", *sys.orig_argv[1:]])}
    result = about | {"date": datetime.now(UTC).isoformat(timespec="seconds"), **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.part")
    try:
        half.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    return path


def read_result(path: Path, kind: str) -> dict[str, Any]:
    """Read a result file; UserError where it is none, or of another kind or layout."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # bytes that are no text, text that is no JSON
        raise UserError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(result, dict) or (result.get("kind"), result.get("layout")) != (kind, LAYOUT):
        raise UserError(f"{path}: not a result of kind {kind} in layout {LAYOUT}")
    return result


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {' | '.join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])} |"

    return "\n".join(map(line, (head, rule, *rows)))
