"""The pass rates of a run's rows, as a file beside its logs and as a histogram."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from vlmr1.data.pass_rates import PassRates
from vlmr1.lifecycle.checkpoint import replace_text
from vlmr1.lifecycle.disk import guard_writes

FILE = "pass_rates.json"
BINS = 10  # between 0 and 1, which have bars of their own
WIDTH = 300  # px of the longest bar


@dataclass(frozen=True)
class Bar:
    """The rows of a range of pass rates."""

    label: str
    rows: int
    kept: int  # within the bounds
    width: int  # px


def keep_pass_rates(rates: PassRates, output_dir: Path) -> None:
    """Write the pass rates beside the logs of a run."""
    content = {"low": rates.low, "high": rates.high, "rows": sorted(rates.rows.items())}
    with guard_writes(FILE, output_dir):
        replace_text(output_dir / FILE, json.dumps(content) + "\n")


def read_pass_rates(run: Path) -> PassRates | None:
    """Return the pass rates of a run; None where its rows were not chosen by them."""
    path = run / FILE
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return PassRates(content["low"], content["high"], Counter(dict(content["rows"])))


def histogram(rates: PassRates | None) -> list[Bar]:
    """Return a bar for rows that never pass, one for each tenth between, and one for those that always pass."""
    if rates is None:
        return []
    labels = ["0", *(f"{i / BINS:g} to {(i + 1) / BINS:g}" for i in range(BINS)), "1"]
    rows, kept = [0] * len(labels), [0] * len(labels)
    for rate, count in rates.rows.items():
        place = 0 if rate == 0 else BINS + 1 if rate == 1 else 1 + math.floor(rate * BINS)
        rows[place] += count
        kept[place] += count * rates.keeps(rate)
    most = max(rows)
    return [Bar(*each, round(WIDTH * each[1] / most)) for each in zip(labels, rows, kept, strict=True)]
