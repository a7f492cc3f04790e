"""Worker processes that score completions, each within a time limit.

Workers are started fresh, not forked: torch's threads do not survive a fork. A worker that exceeds the limit is killed
and replaced.
"""

from __future__ import annotations

import atexit
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from vlmr1.errors import SettingError

START_LIMIT = 120.0  # seconds for the start of a worker, and for the import of a reward's module
CODE = """import json, sys
sys.path[:] = json.loads(sys.argv[2])
from vlmr1.rewards.worker import main
main(int(sys.argv[1]), sys.argv[3] == '1')"""

MESSAGES = 1000  # of a worker whose time is over, that are still read
Task = tuple[str, dict[str, Any]]  # a Reward's spec, and arguments


@dataclass(frozen=True)
class Outcome:
    """The result of a task: its value, the exception that it raised, or a timeout."""

    kind: Literal["value", "error", "timeout"]
    value: Any = None


class WorkerDied(Exception):
    """A worker ended during a task, or never started; `index` is the task's place."""

    def __init__(self, index: int, what: str):
        super().__init__(f"its process {what}")
        self.index = index


class _Worker:
    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            is_main = threading.current_thread() is threading.main_thread()
            command = [sys.executable, "-c", CODE, str(theirs.fileno()), json.dumps(sys.path), str(int(is_main))]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        self.connection = Connection(ours.detach())
        self.index = -1
        self.is_ready = False
        self.deadline = 0.0

    def send(self, index: int, task: Task) -> None:
        self.index, self.deadline = index, time.monotonic() + START_LIMIT
        try:
            self.connection.send(task)
        except OSError as error:
            raise WorkerDied(index, f"died with exit status {self.process.wait()}") from error

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class RewardPool:
    """`workers` processes with `timeout` seconds a completion; they start on first use and end with this process.

    SettingError for fewer than 1 worker, or a time limit that is not above 0.
    """

    def __init__(self, workers: int, timeout: float):
        if workers < 1:
            raise SettingError(f"reward_workers is {workers}: a pool needs at least 1")
        if not timeout > 0:
            raise SettingError(f"reward_timeout is {timeout}: it must be above 0")
        self.workers = workers
        self.timeout = timeout
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        self._on_print: Callable[[int, str], None] = _print_line
        atexit.register(self.close)

    def run(self, tasks: Sequence[Task], on_print: Callable[[int, str], None] | None = None) -> list[Outcome]:
        """Return the outcomes in the order of the tasks. WorkerDied where a worker ends by itself.

        `on_print` gets the place of a task and a line that it printed; without it lines go to standard output."""
        self._on_print = on_print or _print_line
        outcomes: list[Outcome] = [Outcome("timeout")] * len(tasks)
        waiting = list(enumerate(tasks))[::-1]
        try:
            while waiting or self._busy:
                while waiting and len(self._busy) < self.workers:
                    self._busy.append(self._idle.pop() if self._idle else _Worker())
                    self._busy[-1].send(*waiting.pop())
                for worker in self._replies():
                    self._read(worker, outcomes)
                self._end_overrunning(outcomes)
        except BaseException:
            self.close()
            raise
        return outcomes

    def close(self) -> None:
        """End all workers; the next `run` starts new ones."""
        for worker in self._idle + self._busy:
            worker.stop()
        self._idle, self._busy = [], []

    def _replies(self) -> list[_Worker]:
        """Wait until the next deadline for busy workers with a message."""
        left = min(worker.deadline for worker in self._busy) - time.monotonic()
        ready = wait([worker.connection for worker in self._busy], timeout=max(0.0, left))
        return [worker for worker in self._busy if worker.connection in ready]

    def _read(self, worker: _Worker, outcomes: list[Outcome]) -> None:
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(worker.index, f"died with exit status {worker.process.wait()}") from error
        if kind == "ready":
            worker.is_ready = True
        elif kind == "started":
            worker.deadline = time.monotonic() + self.timeout
        elif kind == "printed":
            self._on_print(worker.index, value)
        else:
            outcomes[worker.index] = Outcome(kind, value)
            self._busy.remove(worker)
            self._idle.append(worker)

    def _end_overrunning(self, outcomes: list[Outcome]) -> None:
        now = time.monotonic()
        for worker in [worker for worker in self._busy if worker.deadline <= now]:
            for _ in range(MESSAGES):  # what it has sent in time; a function may print without end
                if worker in self._busy and worker.connection.poll():
                    self._read(worker, outcomes)
            if worker not in self._busy or worker.deadline > now:  # it has just answered, or started
                continue
            self._busy.remove(worker)
            worker.stop()
            if not worker.is_ready:
                raise WorkerDied(worker.index, f"did not start in {START_LIMIT:g} s")


def _print_line(index: int, line: str) -> None:
    print(line)
