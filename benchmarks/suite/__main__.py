"""What sharing gains on this machine, and which switch gains it.

python -m benchmarks.suite --quick                      a look in minutes, on a tiny model
python -m benchmarks.suite --only step --peers none     the steps of the default shape, switch by switch
python -m benchmarks.suite compare A.json B.json        two result files
python -m benchmarks.suite report FILE.json             tables, charts and a page of one
python -m benchmarks.suite readme --check               the README's tables against their result files
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import CheckFailed
from vlmr1.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 where arms compute different things, 2 where a setting cannot be honoured, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] == "compare":
            from benchmarks.suite import compare

            return compare.main(words[1:])
        if words and words[0] == "report":
            from benchmarks.suite import page

            return page.main(words[1:])
        if words and words[0] == "readme":
            from benchmarks.suite import readme

            return readme.main(words[1:])
        return measure(words)
    except UserError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2


def measure(words: Sequence[str]) -> int:
    """A run on each of the shapes, with its report."""
    from benchmarks.suite.options import parse
    from benchmarks.suite.run import run

    options = parse(words)
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)  # what was measured is kept
    try:
        for shape in options.shapes:
            for path in report(run(options, shape)):
                print(path)
    except CheckFailed as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def report(result: Path) -> Sequence[Path]:
    """Tables, charts and a page beside the result file; their paths."""
    from benchmarks.suite import page

    return page.write(result)


if __name__ == "__main__":
    sys.exit(main())
