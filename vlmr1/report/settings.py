"""Settings of a run's logs and report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vlmr1.types import Settings, setting


@dataclass
class ReportSettings(Settings):
    """Logs and reports that a run writes."""

    group = "Reports"

    log_completions: int = setting(4, "completions a step written to completions.jsonl")
    write_report: bool = setting(True, "write training.html into output_dir when the run ends")

    @property
    def completions_to_log(self) -> int:
        """The number of completions of a step in completions.jsonl, at most."""
        return self.log_completions

    def check(self) -> Iterator[str]:
        yield from self.at_least(0, "log_completions")
