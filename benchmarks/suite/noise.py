"""Whether samples of two runs differ by more than noise.

Mann and Whitney's rank test, two-sided, on the samples of the rounds (scipy; exact for up to 8 samples without ties):
it assumes no distribution, and a single slow round, which is what other work on a machine makes, weighs little. Beyond
noise is p of at most `LEVEL`: of 100 arms that did not change about one is reported nevertheless. Five samples a run
can just reach it (2 / 252). What it cannot see is a machine that is slower throughout a run; ratios to a base that was
measured in turn are free of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from scipy.stats import mannwhitneyu

LEVEL = 0.01


@dataclass(frozen=True)
class Change:
    """From `before` to `after`; p is None where so few samples could not show any change."""

    before: float
    after: float
    p: float | None

    @property
    def factor(self) -> float:
        return self.after / self.before

    @property
    def moved(self) -> bool:
        """Beyond noise."""
        return self.p is not None and self.p <= LEVEL

    def __str__(self) -> str:
        mark = " ?" if self.p is None else " *" if self.moved else ""
        return f"{self.factor - 1:+.1%}{mark}"


def p_value(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Chance of ranks at least as uneven where nothing changed; None where even the most uneven are above `LEVEL`."""
    if 2 / comb(len(before) + len(after), len(before)) > LEVEL:
        return None
    if len({*before, *after}) == 1:
        return 1.0
    return float(mannwhitneyu(before, after, alternative="two-sided").pvalue)
