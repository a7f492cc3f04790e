"""One table of the op benchmarks' result files in a folder: `python -m benchmarks.summary [folder]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, table

HEAD = ("op", "case", "arm", "ms", "x floor", "of ceiling", "MiB beyond accumulator")


def rows(folder: Path) -> list[list[str]]:
    """The cases of every file that has some."""
    found = []
    for path in sorted(folder.glob("*.json")):
        figures = json.loads(path.read_text(encoding="utf-8")).get("figures", {})
        for case, result in figures.get("cases", {}).items():
            found += case_rows(figures["op"], case, result)
    return found


def case_rows(op: str, case: str, result: Mapping[str, Any]) -> list[list[str]]:
    """op, case, arm, ms, ratio to the floor, share of the ceiling, extra MiB."""
    found = []
    for arm, row in result["arms"].items():
        floor = f"{row['time/floor']['value']:.2f}" if "time/floor" in row else "-"
        extra = f"{row['extra_beyond_accumulator_mib']:.0f}" if "extra_mib" in row else "-"
        found.append([op, case, arm, f"{row['median_ms']:.4g}", floor, f"{row['ceiling_share']:.0%}", extra])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    print(table(HEAD, rows(Path(words[0]) if words else RESULTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
