"""`vlmr1 bench`: the benchmarks of the checkout that this package is in."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vlmr1.errors import UserError

ROOT = Path(__file__).parents[2]


def run(options: argparse.Namespace, rest: list[str]) -> NoReturn:
    bench(rest)


def bench(words: Sequence[str], root: Path = ROOT) -> NoReturn:
    """Become `python -m benchmarks` with these words, where the caller is.

    UserError where the package was installed without the checkout's `benchmarks`."""
    if not (root / "benchmarks").is_dir():
        raise UserError(f"bench needs a checkout of vlmr1, or an editable installation of one: no benchmarks in {root}")
    paths = [str(root), str(root / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *words], environment)
