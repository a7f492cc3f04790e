"""Two step results side by side: what changed, arm by arm, and whether by more than noise.

A change is beyond noise where a two-sided rank test of Mann and Whitney over the rounds gives p of at most 0.01, for
which 5 rounds a run are needed. Times are compared on one machine only; ratios to the base always.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

from scipy.stats import mannwhitneyu

from benchmarks.harness import ratio, table
from benchmarks.report import number, read
from vlmr1.errors import UserError

LEVEL = 0.01
WORK = ("shape", "dtype", "sizes", "rollout")
MACHINE = ("machine", "device", "threads")
SCALES = {"speed": 1.0, "time": 1e3, "peak": 1.0}  # of what is shown; speed is against the base, more is faster
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """From `before` to `after`; p is None where so few samples could not show any change."""

    before: float
    after: float
    p: float | None

    @property
    def factor(self) -> float:
        return self.after / self.before

    def cells(self, scale: float) -> list[str]:
        mark = " ?" if self.p is None else " *" if self.p <= LEVEL else ""
        return [number(scale * self.before), number(scale * self.after), f"{self.factor - 1:+.1%}{mark}"]


def main(words: Sequence[str] | None = None) -> int:
    """Return 1 where --fail-over finds an arm that is slower."""
    parser = argparse.ArgumentParser(prog="vlmr1 bench compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--fail-over", type=float, metavar="PERCENT", help="exit 1 where an arm is slower by more")
    options = parser.parse_args(words)
    before, after = read(options.before), read(options.after)
    print(text(before, after))
    worse = [] if options.fail_over is None else slower(before, after, options.fail_over)
    for line in worse:
        print(f"slower: {line}", file=sys.stderr)
    return 1 if worse else 0


def text(before: Result, after: Result) -> str:
    """Return the comparison as Markdown, warnings first."""
    blocks = [f"- {name}: commit {run['commit']}, {run['date']}" for name, run in (("A", before), ("B", after))]
    names = (*MACHINE, *WORK, "versions", "complete")
    blocks += [f"- warning: {n} is {before[n]} in A and {after[n]} in B" for n in names if before[n] != after[n]]
    only = {"A": before["arms"].keys() - after["arms"].keys(), "B": after["arms"].keys() - before["arms"].keys()}
    blocks += [f"- only in {run}: {', '.join(sorted(arms))}" for run, arms in only.items() if arms]
    head = ["arm", "speed A", "speed B", "change", "ms A", "ms B", "change", "peak MiB A", "peak MiB B", "change"]
    lines = []
    for name, found in changes(before, after).items():
        cells = ([*found[what].cells(scale)] if what in found else ["-"] * 3 for what, scale in SCALES.items())
        lines.append([name, *(cell for three in cells for cell in three)])
    legend = f"speed: times as fast as the base. * beyond noise (p at most {LEVEL}), ? too few samples to tell."
    return "\n".join([*blocks, "", table(head, lines), "", legend])


def comparable_times(before: Result, after: Result) -> bool:
    return all(before[name] == after[name] for name in (*MACHINE, *WORK))


def changes(before: Result, after: Result) -> dict[str, dict[str, Change]]:
    """Return the changes of the arms that both runs have, in the order of the first."""
    found: dict[str, dict[str, Change]] = {}
    for name in (name for name in before["arms"] if name in after["arms"]):
        rows = [run["arms"][name] for run in (before, after)]
        own = [row["seconds"] for row in rows]
        made = found[name] = {}
        if rows[0]["base"] == rows[1]["base"] != name:
            bases = [run["arms"][row["base"]]["seconds"] for run, row in zip((before, after), rows, strict=True)]
            rounds = [[a / b for a, b in zip(*pair, strict=True)] for pair in zip(bases, own, strict=True)]
            made["speed"] = Change(ratio(bases[0], own[0]), ratio(bases[1], own[1]), p_value(*rounds))
        if comparable_times(before, after):
            made["time"] = Change(median(own[0]), median(own[1]), p_value(*own))
        if all(row.get("peak_mib") for row in rows):
            made["peak"] = Change(rows[0]["peak_mib"], rows[1]["peak_mib"], None)
    return found


def p_value(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Chance of ranks at least as uneven where nothing changed; None where even the most uneven are above `LEVEL`."""
    if 2 / comb(len(before) + len(after), len(before)) > LEVEL:
        return None
    if len({*before, *after}) == 1:
        return 1.0
    return float(mannwhitneyu(before, after, alternative="two-sided").pvalue)


def slower(before: Result, after: Result, percent: float) -> list[str]:
    """Return the arms that are slower by more than `percent`, beyond noise; UserError where nothing can be judged."""
    if any(before[name] != after[name] for name in WORK):
        raise UserError("--fail-over: shape, dtype or sizes of the two runs differ: there is nothing to judge")
    what = "time" if comparable_times(before, after) else "speed"
    judged = {name: of[what] for name, of in changes(before, after).items() if what in of and of[what].p is not None}
    if not judged:
        raise UserError("--fail-over: no arm has enough rounds in both runs to be judged (5 a run)")
    longer = {name: change.factor if what == "time" else 1 / change.factor for name, change in judged.items()}
    said = "time" if what == "time" else "time against its base"
    worse = [name for name, change in judged.items() if (change.p or 0) <= LEVEL and longer[name] - 1 > percent / 100]
    return [f"{name}: {said} changed by {longer[name] - 1:+.1%}, p {judged[name].p:.2g}" for name in worse]
