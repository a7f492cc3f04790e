"""Another interpreter on a checkout."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def environment(tree: Path = ROOT, **more: str) -> dict[str, str]:
    paths = os.pathsep.join(map(str, (tree, tree / "kernels")))
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | more


def python(
    *words: Any, env: dict[str, str] | None = None, cwd: Path = ROOT, **more: Any
) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=env or environment(), cwd=cwd, capture_output=True, text=True, **more)
