"""Tables of README.md and docs/sft.md, made from result files: each stands between `<!-- bench:begin -->` and
`<!-- bench:end -->`.

python -m benchmarks.readme            rewrite them
python -m benchmarks.readme --check    show the difference and exit with 1 where there is one
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from difflib import unified_diff
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import read_result, table
from benchmarks.report import number, read, workload
from vlmr1.errors import UserError

ROOT = Path(__file__).parents[1]
RESULT = Path("benchmarks/results/step-cpu.json")
SFT_RESULT = Path("benchmarks/results/sft-cpu.json")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
LABELS = {"naive": "naive: nothing shared", "trl": "TRL", "all": "vlmr1"}


def main(words: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Return 1 where --check finds a difference, 2 where the table cannot be made."""
    parser = argparse.ArgumentParser(prog="vlmr1 bench readme", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 with the difference")
    options = parser.parse_args(words)
    changed = False
    try:
        for page, text in pages(root).items():
            changed |= _renew(root / page, page, text, check=options.check)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return int(options.check and changed)


def pages(root: Path) -> dict[str, tuple[Path, str]]:
    """Result file and table by page. The table of supervised updates is optional."""
    found = {"README.md": (RESULT, quoted(read(root / RESULT)))}
    if (root / SFT_RESULT).exists():
        from benchmarks import sft  # which imports the trainers

        found["docs/sft.md"] = (SFT_RESULT, sft.quoted(read_result(root / SFT_RESULT, "sft")))
    return found


def _renew(path: Path, page: str, made: tuple[Path, str], *, check: bool) -> bool:
    """Whether the page differs from its result file; the difference is shown with `check`, else written."""
    result, quote = made
    old = path.read_text(encoding="utf-8")
    new = renewed(old, quote, page)
    if check and old != new:
        before, after = (text.splitlines(keepends=True) for text in (old, new))
        sys.stdout.writelines(unified_diff(before, after, page, f"{page}, from {result}"))
    elif old != new:
        path.write_text(new, encoding="utf-8")
        print(path)
    return old != new


def renewed(text: str, quote: str, page: str = "README.md") -> str:
    """Return the text with `quote` between the marks; UserError where they are not there once and in order."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in tail:
        raise UserError(f"{page}: needs {BEGIN} and {END} behind it, once each")
    return f"{head}{BEGIN}\n\n{quote}\n\n{END}{tail}"


def quoted(result: Mapping[str, Any]) -> str:
    """Return the table: naive, TRL and ours, time and memory; below it where the figures come from."""
    arms = result["arms"]
    missing = [name for name in LABELS if name not in arms]
    if missing or not result["complete"] or result["rollout"]:
        reason = f"it has no {', '.join(missing)}" if missing else "it is of a run that was stopped, or of rollouts"
        raise UserError(f"{RESULT}: {reason}; no README quotes it")
    ours, rows = arms["all"], []
    for name, label in LABELS.items():
        time, peak = median(arms[name]["seconds"]), arms[name]["peak_mib"]
        times, memory = time / median(ours["seconds"]), peak / ours["peak_mib"]
        label = f"TRL {result['versions']['trl']}" if name == "trl" else label
        rows.append([label, f"{number(time)} s", f"{times:.1f}x", f"{peak:,.0f} MiB", f"{memory:.1f}x"])
    head = ["one training step", "time", "of ours", "peak memory", "of ours"]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers"))
    work = workload(result)
    source = (
        f"{work[0].upper()}{work[1:]}; {result['machine']}; medians of {len(ours['seconds'])}; {versions}; commit "
        f"{result['commit']}: `{result['command']}`. Memory is above what the process holds between steps."
    )
    return f"{table(head, rows)}\n\n{source}"


if __name__ == "__main__":
    sys.exit(main())
