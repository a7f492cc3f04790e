"""Rows chosen by their column `pass_rate`, which `vlmr1 data rate` writes."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from vlmr1.data.faults import row_fault
from vlmr1.data.findings import NAMED, left_out_message
from vlmr1.data.samples import Samples
from vlmr1.errors import SettingError
from vlmr1.types import Sample

logger = logging.getLogger(__name__)
PASS_RATE, MEAN_REWARD = "pass_rate", "mean_reward"  # columns


@dataclass(frozen=True)
class PassRates:
    """The number of rows of each pass rate, and the bounds of those that are trained on."""

    low: float | None
    high: float | None
    rows: Counter[float] = field(default_factory=Counter)

    def keeps(self, rate: float) -> bool:
        """Return whether a pass rate is within the bounds, or at one of them."""
        return (self.low is None or rate >= self.low) and (self.high is None or rate <= self.high)

    def __str__(self) -> str:
        """The settings of the bounds."""
        bounds = {"min_pass_rate": self.low, "max_pass_rate": self.high}
        return ", ".join(f"{name} {value:g}" for name, value in bounds.items() if value is not None)


def within_pass_rates(samples: Any, settings: Any) -> tuple[Any, PassRates | None]:
    """Return the samples within `min_pass_rate` and `max_pass_rate`, and the pass rates of all; (samples, None) where
    neither is set.

    DataError for the first row without a pass rate, SettingError where no row is left."""
    if settings.min_pass_rate is None and settings.max_pass_rate is None:
        return samples, None
    rates = PassRates(settings.min_pass_rate, settings.max_pass_rate)
    kept, left_out = [], []
    for sample in samples:
        rate = pass_rate(sample)
        rates.rows[rate] += 1
        if rates.keeps(rate):
            kept.append(sample.index)
        else:
            left_out.append(f"{sample.source} ({rate:g})")
    if not kept:
        raise SettingError(f"{rates}: none of the {len(samples)} rows has such a pass rate")
    if left_out:
        why, how = f"their pass rates are out of {rates}", f"the column {PASS_RATE} has those of all rows"
        logger.warning("%s", left_out_message(left_out[:NAMED], len(left_out), len(samples), why, how))
    if isinstance(samples, Samples):
        return samples.select(kept), rates
    within = set(kept)
    return [sample for sample in samples if sample.index in within], rates


def pass_rate(sample: Sample) -> float:
    """Return the pass rate of a row. DataError without one from 0 to 1."""
    value = sample.columns.get(PASS_RATE)
    if value is None:
        what = f"no column {PASS_RATE!r}, which min_pass_rate and max_pass_rate need: `vlmr1 data rate` writes it"
        raise row_fault(sample.source, "pass rate", what)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise row_fault(sample.source, "pass rate", f"{PASS_RATE} is {value!r}, not a number from 0 to 1")
    return float(value)
