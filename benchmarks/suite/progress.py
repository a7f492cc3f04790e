"""A section while it is measured, so that a run that is stopped leaves what it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.suite.samples import Sample

Row = Callable[[str, Sequence[Sample]], dict[str, Any] | None]


class Progress:
    """`section` is filled as things are done, in the layout of the result file; `arms` are its arms. Of those that are
    called in turn there are samples before there are rows."""

    def __init__(self) -> None:
        self.section: dict[str, Any] = {}
        self.forget()

    @property
    def arms(self) -> dict[str, Any]:
        return self.section.setdefault("arms", {})

    def rounds(self, row: Row) -> dict[str, list[Sample]]:
        """For `in_turn`, which keeps its samples there. `row` makes an arm's row of them, without what is measured
        after the rounds; None for an arm that has none."""
        self._row = row
        return self._samples

    def forget(self) -> None:
        """Samples, and what would make rows of them, with all that it holds."""
        self._samples, self._row = {}, lambda name, samples: None

    def so_far(self) -> dict[str, Any]:
        """The section as far as it goes, empty where nothing was measured. Of rounds that were going on only whole ones
        count, so that sample i is of round i; of a first round, the arms that had their turn."""
        section = dict(self.section)
        whole = min((len(of) for of in self._samples.values()), default=0) or 1
        begun = {name: of[:whole] for name, of in self._samples.items() if len(of) >= whole}
        made = {name: self._row(name, of) for name, of in begun.items() if name not in section.get("arms", {})}
        arms = section.pop("arms", {}) | {name: row for name, row in made.items() if row is not None}
        arms = {name: row for name, row in arms.items() if row.get("base", name) in arms}
        if arms:
            return {"arms": arms, **section}
        return {name: value for name, value in section.items() if value}
