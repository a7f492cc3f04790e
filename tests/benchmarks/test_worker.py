"""A worker that answers, one that ends, one that hangs: it has a limit, and what it started ends with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from benchmarks import step_arms
from benchmarks.step_arms import Worker

HANGS = {
    "no answer": "sleep(600)",
    "half an answer": "print('[1, ', end='', flush=True); sleep(600)",
    "deaf to its end": "signal(SIGTERM, SIG_IGN); sleep(600)",
}


@contextmanager
def worker(folder: Path, program: str, limit: float = 60.0) -> Iterator[Worker]:
    head = "import sys, os, subprocess\nfrom signal import signal, SIGTERM, SIG_IGN\nfrom time import sleep\n"
    made = Worker([sys.executable, "-c", head + program], folder / "log", limit=limit)
    try:
        yield made
    finally:
        made.kill()


def alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    """Within 5 seconds."""
    for _ in range(100):
        if not alive(pid):
            return True
        sleep(0.05)
    return False


def test_it_answers_line_by_line(tmp_path: Path):
    with worker(tmp_path, "import json\nfor line in sys.stdin: print(json.dumps([line] * 50_000), flush=True)") as made:
        assert [len(made.ask(word)) for word in ("a", "b")] == [50_000, 50_000]
        made.close()
        assert made.process.returncode == 0


def test_one_that_ended_says_its_last_words(tmp_path: Path):
    with worker(tmp_path, "input(); sys.exit('no such thing')") as made:
        for _ in range(2):  # the second request finds it gone
            with pytest.raises(ChildProcessError, match=r"its process ended with status 1: no such thing"):
                made.ask("seconds")


def test_what_one_that_ended_has_left_behind_is_ended(tmp_path: Path):
    program = "input(); print(subprocess.Popen(['sleep', '600']).pid, flush=True); input(); sys.exit('boom')"
    with worker(tmp_path, program) as made:
        child = made.ask("pid")
        with pytest.raises(ChildProcessError, match=r"its process ended with status 1: boom"):
            made.ask("seconds")
        assert gone(child)


def test_one_that_says_nothing_more_and_goes_on_is_ended(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(step_arms, "CLOSING", 0.2)
    ended = pytest.raises(ChildProcessError, match=r"its process ended with status -9")
    with worker(tmp_path, "input(); os.close(1); sleep(600)") as made, ended:
        made.ask("seconds")


@pytest.mark.parametrize("program", HANGS.values(), ids=HANGS.keys())
def test_one_that_hangs_is_ended_with_what_it_started(program: str, tmp_path: Path):
    start = "child = subprocess.Popen(['sleep', '600'])\nfor line in sys.stdin:\n if line == 'pid\\n': "
    with worker(tmp_path, f"{start}print(child.pid, flush=True)\n else: {program}") as made:
        child = made.ask("pid")
        assert alive(child)
        made.limit, begun = 0.5, monotonic()
        with pytest.raises(ChildProcessError, match=r"no answer in 0\.5 s: its process was ended"):
            made.ask("seconds")
        assert 0.5 <= monotonic() - begun < 30 and made.process.returncode == -9
        assert gone(child)


def test_one_that_goes_on_after_its_input_is_ended(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(step_arms, "CLOSING", 0.2)
    with worker(tmp_path, "print(1, flush=True); sleep(600)") as made:
        assert made.ask("seconds") == 1
        made.close()
        assert made.process.returncode == -9
        made.close()  # and once more
