"""Other people's trainers, each in a process of its own (`benchmarks.peers.steps`), as arms of a section.

On a CPU they are called in turn with our arms. On a GPU they are called after ours, whose memory is free then, one peer
after another: two trainers at a time may not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
        self.where: dict[str, Any] = {"folder": folder, "shape_name": shape, "prompts": prompts}
        self.skipped: dict[str, str] = {}
        self.launched: dict[str, Worker] = {}
        self.workers: dict[str, Worker] = {}  # of those, the ones that are timed
        self.checks: dict[str, dict[str, float]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()

    def launch(self, names: Sequence[str]) -> None:
        """Begin their processes side by side; `start` waits for each."""
        from benchmarks.peers.steps import command

        options = {"threads": self.options.threads, "dtype": self.options.dtype}
        for name in names:
            log = self.where["folder"] / f"{self.kind}-{name}.log"
            worker = Worker(command(name, kind=self.kind, **self.where, **options), log)
            self._stack.callback(worker.close)
            self.launched[name] = worker

    def start(self, name: str, check: Check | None = None) -> bool:
        """A worker that has made one sample. A peer that fails, or whose figures `check` objects to, is left out."""
        if name not in self.launched:
            self.launch([name])
        worker = self.launched[name]
        try:
            if check is not None:
                self.checks[name] = worker.ask("figures")
                if (objection := check(self.checks[name])) is not None:
                    self.skipped[name] = objection
                    worker.close()  # its memory is the next one's
                    return False
            worker.ask("seconds")
        except ChildProcessError as error:
            self.skipped[name] = str(error)
            return False
        self.workers[name] = worker
        return True

    def arms(self, joules: Joules) -> dict[str, Callable[[], Sample]]:
        """One warm sample a call."""

        def arm(name: str) -> Sample:
            if name in self.skipped:
                return Sample(math.nan)
            try:
                seconds, energy = joules.around(lambda: float(self.workers[name].ask("seconds")))
            except ChildProcessError as error:  # the other arms go on
                self.skipped[name] = str(error)
                return Sample(math.nan)
            return Sample(seconds, joules=energy)

        return {name: lambda name=name: arm(name) for name in self.workers}

    def alone(self, name: str, joules: Joules, check: Check | None = None) -> list[Sample]:
        """Samples of one peer, nothing else on the device; none where it was left out."""
        if name in self.skipped or not self.start(name, check):
            return []
        return in_turn({name: self.arms(joules)[name]}, rounds=self.options.rounds, warmup=0)[name]

    def row(self, name: str, samples: list[Sample], tokens: int, **more: Any) -> dict[str, Any] | None:
        """The peer's arm of the result file; its memory and phases are of one further sample each. None where its
        process has ended. The process ends here, so that its memory is free."""
        if name in self.skipped:
            return None
        worker, info = self.workers.pop(name), table()[name]
        try:
            phases = {phase: [float(seconds)] for phase, seconds in worker.ask("phases").items()}
            settings = {name: value for name, value in worker.ask("settings").items() if name != "versions"}
            peak = float(worker.ask("peak_mib"))
        except ChildProcessError as error:
            self.skipped[name] = str(error)
            return None
        finally:
            worker.close()
        if self.options.device == "cuda":
            more["in_turn"] = False
        note = info.note if self.options.device == "cpu" else "; ".join(filter(None, (info.note, "timed after ours")))
        return row(
            samples,
            label=info.label,
            group="peer",
            settings=settings,
            tokens=tokens,
            phases=phases or None,
            peak_mib=peak,
            check=self.checks.get(name),
            note=note,
            **more,
        )
