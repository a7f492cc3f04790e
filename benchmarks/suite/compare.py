"""Two results of the suite side by side: what changed, arm by arm, and whether by more than noise (`noise.py`).

    python -m benchmarks.suite compare before.json after.json --fail-over 5

Ratios to the base of each run, which other work on the machine hardly moves, then times, where machine and work are the
same, then peak memory. With --fail-over the exit status is 1 where an arm takes that many per cent longer, beyond
noise; on another machine, where its ratio to the base is worse by as much."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.suite.entries import Entry, entries
from benchmarks.suite.noise import LEVEL, Change, p_value
from benchmarks.suite.parts import Table, number, plain
from benchmarks.suite.reading import Result, ResultError, read, unfinished
from vlmr1.errors import UserError

WORK = ("shape", "dtype", "quick")


@dataclass(frozen=True)
class Row:
    """One arm in both runs; `speed` is against its base, more is faster."""

    name: str
    speed: Change | None
    seconds: Change | None
    peak: tuple[float, float] | None


def main(words: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite compare", description=about)
    parser.add_argument("before", type=Path, help="result file of the suite, JSON")
    parser.add_argument("after", type=Path)
    parser.add_argument("--fail-over", type=float, metavar="PERCENT", help="exit 1 where something is slower by more")
    options = parser.parse_args(words)
    if options.fail_over is not None and not options.fail_over >= 0:
        parser.error("--fail-over is a percentage, 0 or more")
    try:
        before, after = read(options.before), read(options.after)
        print(markdown(before, after, options.before.name, options.after.name))
        if options.fail_over is None:
            return 0
        worse = slower(before, after, options.fail_over)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for line in worse:
        print(f"slower: {line}", file=sys.stderr)
    return 1 if worse else 0


def markdown(before: Result, after: Result, name: str = "A", other: str = "B") -> str:
    """The comparison, warnings first."""
    blocks = ["# Two runs of the benchmark suite", f"- A: {_run(before, name)}\n- B: {_run(after, other)}"]
    if found := warnings(before, after):
        blocks.append("\n".join(f"- warning: {plain(each)}" for each in found))
    found_rows, absolute = rows(before, after), same_machine(before, after) and same_work(before, after)
    blocks.append(_table(found_rows, absolute).markdown())
    blocks.append(
        f"Speed: times as fast as the base of the same run. * beyond noise: rank test over rounds, p at most {LEVEL}; "
        "? too few rounds to tell (5 a run are needed). Peak memory is measured once: no test."
    )
    changes = [row.seconds.factor for row in found_rows if row.seconds is not None]
    if absolute and changes:
        blocks.append(
            f"Median change of all times: {median(changes) - 1:+.1%}. Where all move alike, it is the machine rather "
            "than the code."
        )
    return "\n\n".join([*blocks, *_only_in(before, after)])


def warnings(before: Result, after: Result) -> list[str]:
    """What makes the two hard to compare, by name."""
    a, b = before["figures"], after["figures"]
    pairs: dict[str, tuple[Any, Any]] = {"machine": (before["machine"], after["machine"])}
    pairs |= {name: (a.get(name), b.get(name)) for name in ("device", "driver", "threads", *WORK)}
    for title, one, other in (("sizes", a["sizes"], b["sizes"]), ("versions", before["versions"], after["versions"])):
        pairs |= {f"{title}/{name}": (one.get(name), other.get(name)) for name in sorted({*one, *other})}
    found = [
        f"{name} is {_said(one)} in A and {_said(other)} in B" for name, (one, other) in pairs.items() if one != other
    ]
    if not same_machine(before, after):
        found.append("times of different machines are not compared")
    elif not same_work(before, after):
        found.append("times of different work are not compared")
    for run, of in (("A", before), ("B", after)):
        if (stopped := unfinished(of)) is not None:
            found.append(f"{run} was {stopped}")
    ours, theirs = entries(before), entries(after)
    for name in ours:
        if name in theirs and ours[name].base_name != theirs[name].base_name:
            found.append(f"the base of {name} is {ours[name].base_name} in A and {theirs[name].base_name} in B")
    return found


def same_machine(before: Result, after: Result) -> bool:
    named = ("device", "threads")
    alike = all(before["figures"][name] == after["figures"][name] for name in named)
    return alike and before["machine"] == after["machine"]


def same_work(before: Result, after: Result) -> bool:
    a, b = before["figures"], after["figures"]
    return all(a[name] == b[name] for name in (*WORK, "sizes"))


def rows(before: Result, after: Result) -> list[Row]:
    """Every arm that both runs have, in the order of the first."""
    ours, theirs = entries(before), entries(after)
    absolute = same_machine(before, after) and same_work(before, after)
    return [_row(name, ours[name], theirs[name], absolute) for name in ours if name in theirs]


def _row(name: str, a: Entry, b: Entry, absolute: bool) -> Row:
    speed = seconds = peak = None
    if a.base and b.base and a.base_name == b.base_name:
        speed = Change(_speed(a), _speed(b), p_value(_by_round(a), _by_round(b)))
    if absolute and a.seconds and b.seconds:
        seconds = Change(median(a.seconds), median(b.seconds), p_value(a.seconds, b.seconds))
    if a.peak is not None and b.peak is not None:
        peak = (a.peak, b.peak)
    return Row(name, speed, seconds, peak)


def _speed(entry: Entry) -> float:
    return median(entry.base) / median(entry.seconds)


def _by_round(entry: Entry) -> list[float]:
    return [base / own for base, own in zip(entry.base, entry.seconds, strict=True)]


def slower(before: Result, after: Result, percent: float) -> list[str]:
    """Arms that are slower by more than `percent`, beyond noise. ResultError where nothing can be judged."""
    if not same_work(before, after):
        raise ResultError("--fail-over: shape, dtype or sizes of the two runs differ: there is nothing to judge")
    absolute = same_machine(before, after)
    changes = {row.name: row.seconds if absolute else row.speed for row in rows(before, after)}
    judged = {name: change for name, change in changes.items() if change is not None and change.p is not None}
    if not judged:
        raise ResultError("--fail-over: no arm has enough rounds in both runs to be judged (5 a run)")
    what = "time" if absolute else "speed against its base"
    found = []
    for name, change in judged.items():
        longer = change.factor if absolute else 1 / change.factor
        if change.moved and longer - 1 > percent / 100:
            found.append(f"{name}: {what} changed by {change.factor - 1:+.1%}, p {change.p:.2g}")
    return found


def _table(found: Sequence[Row], absolute: bool) -> Table:
    head = ["arm", "speed A", "speed B", "change of speed"]
    head += ["ms A", "ms B", "change of time"] if absolute else []
    head += ["peak MiB A", "peak MiB B", "change of peak"]
    lines = []
    for row in found:
        line = [row.name, *_three(row.speed, 1.0)]
        line += _three(row.seconds, 1e3) if absolute else []
        if row.peak is None:
            line += ["-"] * 3
        else:
            a, b = row.peak
            line += [number(a), number(b), f"{b / a - 1:+.1%}" if a > 0 else "-"]
        lines.append(line)
    return Table(head, lines)


def _three(change: Change | None, scale: float) -> list[str]:
    if change is None:
        return ["-"] * 3
    return [number(scale * change.before), number(scale * change.after), str(change)]


def _only_in(before: Result, after: Result) -> list[str]:
    ours, theirs = entries(before), entries(after)
    missing = {"A": [name for name in ours if name not in theirs], "B": [name for name in theirs if name not in ours]}
    return [f"Only in {run}: {plain(', '.join(names))}" for run, names in missing.items() if names]


def _run(result: Result, name: str) -> str:
    return plain(f"{name}, commit {result['commit']}, {result['date']}, on {result['machine']}")


def _said(value: Any) -> str:
    return "absent" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
