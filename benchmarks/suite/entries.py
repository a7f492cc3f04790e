"""The arms of a result in one flat table, by section and name, as a comparison of runs needs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.compare import FLOOR
from benchmarks.suite.reading import OPS, TIMED, Result


@dataclass(frozen=True)
class Entry:
    """What a run has of one arm; `base` is empty for an arm that is its own."""

    seconds: Sequence[float] = ()
    base: Sequence[float] = ()
    base_name: str = ""
    peak: float | None = None


def entries(result: Result) -> dict[str, Entry]:
    """Every arm of a run by section and name."""
    return dict(_entries(result["figures"]["sections"]))


def _entries(sections: Mapping[str, Any]) -> Iterator[tuple[str, Entry]]:
    for section in (each for each in sections if each in TIMED):
        arms = sections[section]["arms"]
        for name, arm in arms.items():
            base = [] if arm["base"] == name else arms[arm["base"]]["seconds"]
            yield f"{section}/{name}", Entry(arm["seconds"], base, arm["base"], arm.get("peak_mib"))
        for cell in sections[section].get("grid", []):
            where = f"G {cell['num_generations']}, {cell['prompt_tokens']} x {cell['completion_tokens']}"
            naive, whole = cell["seconds"]["naive"], cell["seconds"]["all"]
            yield f"{section}/{where}, naive", Entry(naive)
            yield f"{section}/{where}, all", Entry(whole, naive, "naive")
    for section in (each for each in sections if each in OPS):
        for key, case in sections[section].items():
            floor = case["seconds"].get(FLOOR, [])
            for name, seconds in case["seconds"].items():
                base = [] if name == FLOOR else floor
                peak = case["arms"].get(name, {}).get("extra_mib")
                yield f"{section}/{key}/{name}", Entry(seconds, base, FLOOR if base else "", peak)
    for name, arm in sections.get("memory", {}).get("arms", {}).items():
        yield f"memory/{name}", Entry(peak=arm["peak_mib"])
