"""The table of peer trainers, and a peer in a process of its own with a time limit for each answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from select import select
from time import monotonic
from typing import Any, NamedTuple

CLOSING = 30.0  # seconds that a worker has to end by itself


def missing(*packages: str) -> str | None:
    """Return which of these packages are not installed; None where all are."""
    absent = [name for name in packages if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


class Peer(NamedTuple):
    """A peer: its label, how it is run, and why it cannot run here."""

    label: str
    note: str
    why_not: Callable[[], str | None]


TRL_NOTE = "its GRPOTrainer, rollouts by transformers; loss_type grpo, no bias correction of the KL"
PEERS = {"trl": Peer("TRL", TRL_NOTE, lambda: missing("trl", "datasets"))}


def command(name: str, *, folder: Path, shape: str, threads: int, dtype: str) -> list[str]:
    """Return the command of a peer's worker, to be run in the root of the repository."""
    words = ["--peer", name, "--folder", str(folder), "--shape", shape, "--threads", str(threads), "--dtype", dtype]
    return [sys.executable, "-m", "benchmarks.peers.worker", *words]


class Worker:
    """A process that answers each line on its standard input with a line of JSON. It leads a process group, so that
    what it starts is killed with it. Its standard error goes to `log`; `limit`: seconds that it has for an answer."""

    def __init__(self, words: Sequence[str], log: Path, *, limit: float):
        self.log, self.limit, self.killed = log, limit, False
        with open(log, "w", encoding="utf-8") as errors:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.process = subprocess.Popen(words, bufsize=0, process_group=0, **pipes)

    def ask(self, request: str) -> Any:
        """Send one line, wait for one line of JSON. ChildProcessError with the last line of its log, where it has ended
        or does not answer in time and is killed."""
        assert self.process.stdin is not None
        answer = b""
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{request}\n".encode())
            answer = self._line()
        if answer.endswith(b"\n"):
            return json.loads(answer)
        status = self._end()
        said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise ChildProcessError(": ".join([f"its process ended with status {status}", *said]))

    def _line(self) -> bytes:
        """Return what it writes up to the end of a line, or to its own end."""
        assert self.process.stdout is not None
        line, end = b"", monotonic() + self.limit
        while not line.endswith(b"\n"):
            if not select([self.process.stdout], [], [], max(0.0, min(1.0, end - monotonic())))[0]:
                if self.process.poll() is not None:  # what it started may hold the pipe
                    break
                if monotonic() >= end:
                    self.kill()
                    raise ChildProcessError(f"no answer in {self.limit:g} s: its process was ended")
                continue
            read = self.process.stdout.read(65536)
            if not read:
                break
            line += read
        return line

    def kill(self) -> None:
        """End it, and what it started and left behind, at once."""
        if not self.killed:
            self.killed = True
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        """End the process by closing its input; one that goes on all the same is killed."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self._end()

    def _end(self) -> int:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSING)
        self.kill()
        return self.process.wait()


class PeerArm(Worker):
    """A peer's worker (`worker.py`) as an arm of the step benchmark. Its clock is its own."""

    def figures(self) -> dict[str, float]:
        return self.ask("figures")

    def first(self, _clock: Any) -> tuple[float, float | None]:
        """Seconds of a first step, and the peak memory of a second, in MiB."""
        return float(self.ask("seconds")), self.ask("peak_mib")

    def seconds(self, _clock: Any) -> float:
        return float(self.ask("seconds"))

    def phases(self) -> dict[str, float]:
        return {}
