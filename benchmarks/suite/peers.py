"""Other people's trainers, each in a process of its own (`benchmarks.peers.steps`), as arms of a section.

On a CPU they are called in turn with our arms. On a GPU they are called after ours, whose memory is free then, one peer
after another: two trainers at a time may not fit. One that does not answer in time is ended and left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.step_arms import Worker
from benchmarks.suite.energy import Joules
from benchmarks.suite.samples import Sample, in_turn, row
from benchmarks.suite.sizes import PROMPTS

if TYPE_CHECKING:
    from benchmarks.suite.context import Context

Check = Callable[[Mapping[str, float]], str | None]  # figures -> what is wrong with them


def table() -> Mapping[str, Any]:
    """The known peers by name."""
    from benchmarks.peers.steps import PEERS

    return PEERS


class Peers:
    """The chosen peers' workers of one kind, "step" or "update", for as long as the `with` block lasts."""

    def __init__(self, context: Context, kind: Literal["step", "update"]):
        self.context, self.options = context, context.options
        self.kind: Literal["step", "update"] = kind
        self.skipped: dict[str, str] = {}
        self.launched: dict[str, Worker] = {}
        self.workers: dict[str, Worker] = {}  # of those, the ones that are timed
        self.checks: dict[str, dict[str, float]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Peers:
        self.context.skip(self.kind, self.options.left_out)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:  # nobody waits for what they are doing
            for worker in self.launched.values():
                worker.kill()
        self._stack.close()

    def leave_out(self, name: str, reason: str) -> None:
        """No more samples of it."""
        self.skipped[name] = reason
        self.context.skip(self.kind, {name: reason})

    def launch(self, names: Sequence[str]) -> None:
        """Begin their processes side by side; `start` waits for each."""
        from benchmarks.peers.steps import command

        context = self.context
        given: dict[str, Any] = {"folder": context.folder, "shape_name": context.shape_name, "prompts": PROMPTS}
        given |= {"threads": self.options.threads, "dtype": self.options.dtype}
        for name in names:
            log = context.folder / f"{self.kind}-{name}.log"
            worker = Worker(command(name, kind=self.kind, **given), log, limit=self.options.peer_limit)
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
                    self.leave_out(name, objection)
                    worker.close()  # its memory is the next one's
                    return False
            worker.ask("seconds")
        except ChildProcessError as error:
            self.leave_out(name, str(error))
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
                self.leave_out(name, str(error))
                return Sample(math.nan)
            return Sample(seconds, joules=energy)

        return {name: lambda name=name: arm(name) for name in self.workers}

    def alone(self, name: str, tokens: int, base: str, check: Check | None = None) -> list[Sample]:
        """Samples of one peer, nothing else on the device: `context.drop_bed` comes first. None where it was left
        out."""
        if name in self.skipped or not self.start(name, check):
            return []
        kept = self.context.progress.rounds(lambda name, samples: self.of_rounds(name, samples, tokens, base))
        return in_turn({name: self.arms(self.context.joules)[name]}, rounds=self.options.rounds, kept=kept)[name]

    def of_rounds(
        self, name: str, samples: Sequence[Sample], tokens: int, base: str, **more: Any
    ) -> dict[str, Any] | None:
        """A row of samples; None for a peer that was left out."""
        if name in self.skipped:
            return None
        info, on_gpu = table()[name], self.options.device == "cuda"
        note = "; ".join(filter(None, (info.note, "timed after ours" if on_gpu else "")))
        given = {"settings": {}, "check": self.checks.get(name), "note": note, "in_turn": False if on_gpu else None}
        return row(samples, **{**given, **more}, label=info.label, group="peer", base=base, tokens=tokens)

    def row(self, name: str, samples: Sequence[Sample], tokens: int, base: str) -> dict[str, Any] | None:
        """The peer's arm of the result file; its memory and phases are of one further sample each. None where its
        process has ended. The process ends here, so that its memory is free."""
        if name in self.skipped:
            return None
        worker = self.workers.pop(name)
        try:
            phases = {phase: [float(seconds)] for phase, seconds in worker.ask("phases").items()}
            settings = {name: value for name, value in worker.ask("settings").items() if name != "versions"}
            peak = float(worker.ask("peak_mib"))
        except ChildProcessError as error:
            self.leave_out(name, str(error))
            return None
        finally:
            worker.close()
        return self.of_rounds(name, samples, tokens, base, settings=settings, phases=phases or None, peak_mib=peak)
