"""Bootstrap over rows: 95% intervals of a metric, and of its difference between two models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 1000
SEED = 0
AT_ONCE = 50  # resampled data sets held in memory
LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Metric:
    """A metric with its bootstrap 95% interval; None where it is undefined, such as a share of no boxes.

    `replicates` [DRAWS] are its values on the resampled data sets. Data set i has the same rows for every metric and
    model, so replicates of two models are paired."""

    value: float | None
    low: float | None
    high: float | None
    replicates: np.ndarray


def counts(rows: int) -> Iterator[np.ndarray]:
    """Yield counts of each row in DRAWS resampled data sets, as arrays [AT_ONCE, rows] float64."""
    for start in range(0, DRAWS, AT_ONCE):
        rng = np.random.default_rng([SEED, start])
        yield rng.multinomial(rows, np.full(rows, 1 / rows), size=AT_ONCE).astype(np.float64)


def bootstrap(value: float, rows: int, statistic: Callable[[np.ndarray], np.ndarray]) -> Metric:
    """Bootstrap a metric; `statistic` maps counts [d, rows] to its value on each resampled data set [d], or NaN."""
    replicates = np.concatenate([statistic(each) for each in counts(rows)])
    return metric(value, replicates)


def metric(value: float, replicates: np.ndarray) -> Metric:
    """Build a metric from its value on the data and on the resampled data sets."""
    low, high = interval(replicates)
    return Metric(None if np.isnan(value) else float(value), low, high, replicates)


def interval(replicates: np.ndarray) -> tuple[float | None, float | None]:
    """Return the 95% interval over the resampled data sets that have a value."""
    known = replicates[~np.isnan(replicates)]
    if not len(known):
        return None, None
    low, high = np.quantile(known, LEVELS)
    return float(low), float(high)


def ratio(parts: Sequence[float], wholes: Sequence[float] | None = None) -> Metric:
    """Return sum(parts) / sum(wholes) over the rows as a metric; a mean where no `wholes` are given."""
    above = np.asarray(parts, dtype=np.float64)
    below = np.ones_like(above) if wholes is None else np.asarray(wholes, dtype=np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        # Sums, not matrix products: they round equally with any number of threads.
        return _divided((weights * above).sum(-1), (weights * below).sum(-1))

    return bootstrap(float(_divided(above.sum(), below.sum())), len(above), statistic)


def _divided(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), np.nan)
