"""benchmarks/gpu.sh goes on after a part that fails, and says so at the end; python is a stand-in here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs timeout of GNU coreutils")


def run(tmp_path: Path, fails: str, *parts: str) -> subprocess.CompletedProcess[str]:
    stand_in(tmp_path / "python", f'echo "called: $*"; case "$*" in {fails}) exit 7;; esac')
    stand_in(tmp_path / "compute-sanitizer", 'echo "sanitized: $*"')
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "OUT": str(tmp_path / "out"),
    }
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *parts]
    return subprocess.run(script, capture_output=True, text=True, env=environment, timeout=60)


def stand_in(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_every_part_runs_although_one_fails(tmp_path: Path):
    done = run(tmp_path, "*bench_linear_logprob*")
    assert done.returncode == 1
    table = done.stdout.rsplit("\n\n", 1)[1].splitlines()
    assert [line.split()[:2] for line in table] == [
        ["imports", "ok"],
        ["tests", "ok"],
        ["racecheck", "ok"],
        ["bench_linear_grpo_loss", "ok"],
        ["bench_linear_logprob", "failed"],
        ["bench_grpo_loss", "ok"],
        ["bench_group_advantages", "ok"],
        ["summary", "ok"],
        ["bench_shared_prefix_attention", "ok"],
        ["bench_varlen_attention", "ok"],
        ["bench_shared_prefix_decode", "ok"],
        *([f"suite-{section}", "ok"] for section in ("step", "update", "rollout", "memory")),
        ["plan-3b", "ok"],
        ["plan-7b", "ok"],
    ]
    log = (tmp_path / "out" / "gpu.log").read_text()
    assert "called: -m pytest -q -m gpu" in log
    assert "sanitized: --tool racecheck --error-exitcode 3" in log
    assert f"called: -m benchmarks.bench_grpo_loss --device cuda --out {tmp_path}/out\n" in log


def test_only_the_parts_that_are_named_run(tmp_path: Path):
    done = run(tmp_path, "nothing", "imports", "plan")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.rsplit("\n\n", 1)[1].splitlines()] == [
        "imports",
        "plan-3b",
        "plan-7b",
    ]
