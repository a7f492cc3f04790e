"""Tables of the READMEs, made from result files: what stands between two marks is written by this.

    <!-- table NAME from benchmarks/results/FILE.json -->
    <!-- end -->

`python -m benchmarks.suite.readme` rewrites it, `--check` shows the difference and exits with 1 where there is one.
NAME is a part of the suite's report (ablation, peers, phases, rollout, update, grid, memory, ops, attention), or one of
`quoted.QUOTED`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import unified_diff
from pathlib import Path
from typing import Any

from benchmarks.suite import tables
from benchmarks.suite.parts import Part
from benchmarks.suite.quoted import QUOTED, source
from benchmarks.suite.reading import OPS, Result, ResultError, read, read_any, unfinished
from vlmr1.errors import UserError

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "kernels/README.md")
START, END = re.compile(r"<!-- table (\S+) from (\S+) -->"), "<!-- end -->"
SUITE: dict[str, Callable[[Result], Part]] = {
    "ablation": tables.ablation,
    "peers": tables.peers,
    "phases": tables.phases,
    "rollout": tables.rollout,
    "update": tables.update,
    "grid": tables.grid,
    "memory": tables.memory,
    "ops": lambda result: tables.ops(result, "ops"),
    "attention": lambda result: tables.ops(result, "attention"),
}


def main(words: Sequence[str] | None = None, root: Path = ROOT) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite readme", description=about)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 with the difference")
    options = parser.parse_args(words)
    try:
        found = {path: (path.read_text(encoding="utf-8"), renewed(path, root)) for path in (root / f for f in FILES)}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    stale = {path: texts for path, texts in found.items() if texts[0] != texts[1]}
    for path, (old, new) in stale.items():
        if options.check:
            name = str(path.relative_to(root))
            before, after = (text.splitlines(keepends=True) for text in (old, new))
            sys.stdout.writelines(unified_diff(before, after, name, f"{name}, from the result files"))
        else:
            path.write_text(new, encoding="utf-8")
            print(path)
    return 1 if options.check and stale else 0


def renewed(path: Path, root: Path) -> str:
    """The file's text with what its marks ask for. ResultError names the line of a mark that is wrong."""
    lines, opened = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        start = START.fullmatch(line.strip())
        if opened and start:
            raise ResultError(f"{path}:{opened}: this table has no {END} before the next")
        if not opened and line.strip() == END:
            raise ResultError(f"{path}:{number}: {END} without a table")
        if start:
            opened = number
            lines += [line, "\n", f"{quote(start[1], root / start[2], f'{path}:{number}')}\n", "\n"]
        elif line.strip() == END:
            opened = 0
            lines.append(line)
        elif not opened:
            lines.append(line)
    if opened:
        raise ResultError(f"{path}:{opened}: this table has no {END}")
    return "".join(lines)


def quote(name: str, file: Path, where: str) -> str:
    """The Markdown that a result file has under this name."""
    known = {**QUOTED, **SUITE}
    if name not in known:
        raise ResultError(f"{where}: no table is called {name!r}; known: {', '.join(known)}")
    try:
        return QUOTED[name](read_any(file)) if name in QUOTED else _suite(name, file)
    except KeyError as error:
        raise ResultError(f"{where}: {file.name} has no {error} for the table {name!r}") from None


def _suite(name: str, file: Path) -> str:
    result = read(file)
    if (stopped := unfinished(result)) is not None:
        raise ResultError(f"{file}: the run was {stopped}; no README quotes it")
    part = SUITE[name](result)
    last = source(result, tables.workload(result), _samples(name, result["figures"]["sections"]))
    return "\n\n".join([*part.notes, *(table.markdown() for table in part.tables), last])


def _samples(name: str, sections: Mapping[str, Any]) -> str:
    """How many samples the medians of a table are of."""
    if name == "memory":
        return "once each"
    if name == "grid":
        taken = [cell["seconds"] for cell in sections["update"]["grid"]]
    elif name in OPS:
        taken = [case["seconds"] for case in sections[name].values()]
    else:
        arms = sections[name if name in sections else "step"]["arms"]
        taken = [{arm: row["seconds"] for arm, row in arms.items()}]
    counts = sorted({len(seconds) for of in taken for seconds in of.values()})
    return f"medians of {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
