"""One table of the op benchmarks' result files in a folder: `python -m benchmarks.summary [folder]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, table


def rows(folder: Path) -> list[list[str]]:
    """op, case, arm, ms, ratio to the floor, share of the ceiling, extra MiB; of every file that has cases."""
    found = []
    for path in sorted(folder.glob("*.json")):
        figures = json.loads(path.read_text(encoding="utf-8")).get("figures", {})
        for case, result in figures.get("cases", {}).items():
            for arm, row in result["arms"].items():
                floor = f"{row['time/floor']['value']:.2f}" if "time/floor" in row else "-"
                extra = f"{row['extra_beyond_accumulator_mib']:.0f}" if "extra_mib" in row else "-"
                share = f"{row['ceiling_share']:.0%}"
                found.append([figures["op"], case, arm, f"{row['median_ms']:.4g}", floor, share, extra])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    lines = rows(Path(words[0]) if words else RESULTS)
    print(table(["op", "case", "arm", "ms", "x floor", "of ceiling", "MiB beyond accumulator"], lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
