"""Other people's trainers, each in a process of its own (`benchmarks.peers.steps`), as arms of a section.

On a CPU they are called in turn with our arms. On a GPU they are called after ours, whose memory is free then, one peer
after another: two trainers at a time may not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.step_arms import Worker
from benchmarks.suite.energy import Joules
from benchmarks.suite.samples import Sample, in_turn, row

if TYPE_CHECKING:
    from benchmarks.suite.options import Options

Check = Callable[[Mapping[str, float]], str | None]  # figures -> what is wrong with them


def table() -> Mapping[str, Any]:
    """The known peers by name."""
    from benchmarks.peers.steps import PEERS

    return PEERS


class Peers:
    """The chosen peers' workers of one kind, "step" or "update", for as long as the `with` block lasts."""

    def __init__(self, options: Options, kind: Literal["step", "update"], folder: Path, shape: str, prompts: int):
        self.options = options
        self.kind: Literal["step", "update"] = kind
        self.where = {"folder": folder, "shape_name": shape, "prompts": prompts}
        self.skipped: dict[str, str] = {}
        self.workers: dict[str, Worker] = {}
        self.checks: dict[str, dict[str, float]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def start(self, name: str, check: Check | None = None) -> bool:
        """A worker that has made one sample. A peer that fails, or whose figures `check` objects to, is left out."""
        from benchmarks.peers.steps import command

        options = {"threads": self.options.threads, "dtype": self.options.dtype}
        worker = Worker(command(name, kind=self.kind, **self.where, **options))
        self._stack.callback(worker.close)
        try:
            if check is not None:
                self.checks[name] = worker.ask("figures")
                if (objection := check(self.checks[name])) is not None:
                    self.skipped[name] = objection
                    return False
            worker.ask("seconds")
        except ChildProcessError:
            self.skipped[name] = f"its process ended with status {worker.process.wait()}"
            return False
        self.workers[name] = worker
        return True

    def arms(self, joules: Joules) -> dict[str, Callable[[], Sample]]:
        """One warm sample a call."""

        def arm(worker: Worker) -> Sample:
            seconds, energy = joules.around(lambda: float(worker.ask("seconds")))
            return Sample(seconds, joules=energy)

        return {name: lambda worker=worker: arm(worker) for name, worker in self.workers.items()}

    def alone(self, name: str, joules: Joules, check: Check | None = None) -> list[Sample]:
        """Samples of one peer, nothing else on the device; none where it was left out."""
        if name in self.skipped or not self.start(name, check):
            return []
        return in_turn({name: self.arms(joules)[name]}, rounds=self.options.rounds, warmup=0)[name]

    def row(self, name: str, samples: list[Sample], tokens: int, **more: Any) -> dict[str, Any]:
        """The peer's arm of the result file; its memory and phases are of one further sample each."""
        worker, info = self.workers[name], table()[name]
        phases = {phase: [float(seconds)] for phase, seconds in worker.ask("phases").items()}
        note = info.note if self.options.device == "cpu" else "; ".join(filter(None, (info.note, "timed after ours")))
        return row(
            samples,
            label=info.label,
            group="peer",
            base="naive",
            settings={name: value for name, value in worker.ask("settings").items() if name != "versions"},
            tokens=tokens,
            phases=phases or None,
            peak_mib=float(worker.ask("peak_mib")),
            check=self.checks.get(name),
            note=note,
            **more,
        )

    def close(self, name: str) -> None:
        """End one worker, so that its memory is free."""
        self.workers.pop(name).close()
