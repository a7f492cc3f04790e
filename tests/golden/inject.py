"""Put one-line faults into a copy of the tree, one at a time: the test named beside each must fail.

`python -m tests.golden.inject` does so here; with `--base CHECKOUT` in a checkout of 8ceb0df. The faults are in
faults.jsonl: `old` is replaced by `new` in `file`; `test` is a test of pytest or a file of tests. What differs at
8ceb0df is under `base`, null where no test caught the fault there."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.helpers.python import environment, python

HERE = Path(__file__).parent
TREE = HERE.parents[1]
LIBRARIES = "kernels/vlmr1_kernels/native/*.so"  # built, not tracked
PASSED, FAILED = 0, 1  # exit codes of pytest; others mean that it could not run the test


def read_faults(*, base: bool) -> list[dict[str, Any]]:
    """Return the faults of this tree, or of 8ceb0df."""
    faults = [json.loads(line) for line in (HERE / "faults.jsonl").read_text(encoding="utf-8").splitlines()]
    return [fault | fault["base"] for fault in faults if fault["base"] is not None] if base else faults


def copy_tree(tree: Path, target: Path) -> None:
    """Copy the tracked files of a checkout and its native library."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=tree, check=True, capture_output=True, text=True).stdout
    names = [name for name in listed.split("\0") if name and (tree / name).is_file()]
    for name in [*names, *(str(path.relative_to(tree)) for path in tree.glob(LIBRARIES))]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tree / name, target / name)


def run_tests(tree: Path, *tests: str) -> tuple[int, str]:
    """Return pytest's exit code and the end of its output."""
    # A fault that keeps size and second of a file would not be seen in its byte code.
    variables = environment(tree, PYTHONDONTWRITEBYTECODE="1")
    done = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, env=variables, cwd=tree)
    return done.returncode, (done.stdout + done.stderr)[-2000:]


def is_caught(tree: Path, fault: dict[str, Any]) -> bool:
    """Whether the fault's test fails with it. ValueError where the fault does not fit the tree or no test was run."""
    path = tree / fault["file"]
    text = path.read_text(encoding="utf-8")
    if text.count(fault["old"]) != 1:
        raise ValueError(f"{fault['name']}: {fault['file']} has its text {text.count(fault['old'])} times, not once")
    path.write_text(text.replace(fault["old"], fault["new"]), encoding="utf-8")
    code, output = run_tests(tree, fault["test"])
    path.write_text(text, encoding="utf-8")
    if code not in (PASSED, FAILED):
        raise ValueError(f"{fault['name']}: {fault['test']} did not run:\n{output}")
    return code == FAILED


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="names of faults")
    parser.add_argument("--base", type=Path, help="a checkout of 8ceb0df with its native library")
    options = parser.parse_args(words)
    faults = [f for f in read_faults(base=options.base is not None) if not options.only or f["name"] in options.only]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(options.base or TREE, tree)
        code, output = run_tests(tree, *dict.fromkeys(fault["test"] for fault in faults))
        if code != PASSED:
            raise SystemExit(f"without a fault:\n{output}")
        found = []
        for fault in faults:
            found.append(is_caught(tree, fault))
            print(f"{fault['name']:32} {'caught' if found[-1] else 'NOT CAUGHT'}  {fault['what']}", flush=True)
    print(f"{sum(found)} of {len(found)} faults are caught")
    return 0 if found and all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
