"""Samples of arms that are called in turn, and the rows that a result file keeps of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness import PeakMemory, alternate, timed
from benchmarks.heap import returned_at_once
from benchmarks.suite.energy import Joules

PHASES = ("rollout", "reward", "reference", "forward", "backward", "update")


@dataclass(frozen=True)
class Sample:
    """One call of an arm."""

    seconds: float
    peak_mib: float | None = None  # above what was held before; on a GPU
    joules: float | None = None
    phases: Mapping[str, float] = field(default_factory=dict)


def nothing() -> None:
    pass


def sample(
    run: Callable[[], Any],
    joules: Joules,
    phases: Callable[[], Mapping[str, float]] = dict,
    *,
    before: Callable[[], None] = nothing,
) -> Sample:
    """Time, peak memory and energy of one call. `before` lets go of what it does not need; `phases` is asked after."""
    before()
    gc.collect()
    peak = PeakMemory()
    seconds, energy = joules.around(timed(run))
    return Sample(seconds, peak.mib() if peak.cuda else None, energy, dict(phases()))


def peak_mib(samples: Sequence[Sample], run: Callable[[], Any], *, before: Callable[[], None] = nothing) -> float:
    """The highest of the samples; on a CPU, where they have none, that of one more call, in which freed memory goes
    back to the system."""
    known = [each.peak_mib for each in samples if each.peak_mib is not None]
    if known:
        return max(known)
    before()
    with returned_at_once():
        peak = PeakMemory()
        run()
        return peak.mib()


def in_turn(
    arms: Mapping[str, Callable[[], Sample]], *, rounds: int, kept: dict[str, list[Sample]] | None = None
) -> dict[str, list[Sample]]:
    """Samples of each arm, which is warm, called as `harness.alternate` does. `kept`: where they go, one by one."""
    kept = {} if kept is None else kept
    kept |= {name: [] for name in arms}

    def call(name: str) -> float:
        kept[name].append(arms[name]())
        return kept[name][-1].seconds

    alternate({name: lambda name=name: call(name) for name in arms}, rounds=rounds, warmup=0)
    return kept


def row(
    samples: Sequence[Sample],
    *,
    label: str,
    base: str,
    tokens: int,
    settings: Mapping[str, Any],
    group: str = "ablation",
    note: str = "",
    **more: Any,
) -> dict[str, Any]:
    """An arm of the result file; what was not measured is left out, and so is what of `more` is None."""
    made: dict[str, Any] = {"label": label, "group": group, "base": base, "settings": dict(settings)}
    made |= {"seconds": [each.seconds for each in samples], "tokens": tokens}
    names = [phase for phase in PHASES if all(phase in each.phases for each in samples)]
    if names:
        made["phases"] = {phase: [each.phases[phase] for each in samples] for phase in names}
    joules = [each.joules for each in samples if each.joules is not None]
    if len(joules) == len(samples):
        made["energy_joules"] = joules
    return made | {name: value for name, value in more.items() if value is not None} | {"note": note}
