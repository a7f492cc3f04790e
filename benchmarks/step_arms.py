"""Updates of fixed groups by this trainer, with all sharing on and off; and arms in a process of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from select import select
from time import monotonic, perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import model as bench_model
from vlmr1.config import GRPOConfig
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.types import Group

BETA = 0.04
CLOSING = 30.0  # seconds that a worker has to end by itself
SWITCHES: dict[str, dict[str, Any]] = {
    "shared": {"share_vision": True, "share_prompt": True, "pack": True},
    "naive": {"share_vision": False, "share_prompt": False, "pack": False},
}


class Arm(Protocol):
    """One update's gradients from fixed groups."""

    model: Any

    def update(self) -> Tensor:
        """Reference forward, policy forward and backward; the loss."""
        ...


class OurArm:
    """`GRPOTrainer`'s own methods, from groups on: pack, reference, backward."""

    def __init__(
        self, name: str, model: Any, processor: Any, groups: Sequence[Group], output: Path, **settings: Any
    ) -> None:
        given: dict[str, Any] = {"beta": BETA, "report_to": "none"} | SWITCHES[name] | settings
        config = GRPOConfig(
            output_dir=str(output),
            use_cpu=not torch.cuda.is_available(),
            num_generations=len(groups[0].completions),
            max_completion_length=len(groups[0].completions[0].token_ids),
            **given,
        )
        self.trainer = GRPOTrainer(model, config, [], processor, reward_funcs=["format"])
        if self.trainer.reference is not None:
            bench_model.perturb(self.trainer.reference.model)
        self.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.groups = groups

    def update(self) -> Tensor:
        """As `training_step`, after the rewards."""
        groups = as_drawn(self.groups)
        self.trainer.add_logprobs(self.model, groups)
        return self.trainer.backward(self.model, groups)[0]


def as_drawn(groups: Sequence[Group]) -> list[Group]:
    """The groups without what an update before has added to their completions."""
    facts: dict[str, Any] = {"old_logp": None, "ref_logp": None, "importance_denominator": None}
    return [replace(g, completions=tuple(replace(c, **facts) for c in g.completions)) for g in groups]


def figures(arm: Arm) -> dict[str, float]:
    """What the arms must agree on: the loss and the gradient norm of one update."""
    arm.model.zero_grad(set_to_none=True)
    loss = float(arm.update())
    norms = [parameter.grad.norm() for parameter in arm.model.parameters() if parameter.grad is not None]
    return {"loss": loss, "grad_norm": float(torch.stack(norms).norm())}


def seconds(arm: Arm) -> float:
    """Of one update, on gradients that are None before it."""
    arm.model.zero_grad(set_to_none=True)
    start = perf_counter()
    loss = arm.update()
    float(loss)
    return perf_counter() - start


class Worker:
    """An arm in a process of its own that stays up; `benchmarks.peers.steps` is the other end. It leads a process
    group, so that what it starts is killed with it. What it says on standard error goes to `log`; `limit`: seconds that
    it has for an answer."""

    def __init__(self, command: Sequence[str], log: Path, *, limit: float):
        self.log, self.limit, self.killed = log, limit, False
        with open(log, "w", encoding="utf-8") as errors:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.process = subprocess.Popen(command, bufsize=0, process_group=0, **pipes)

    def ask(self, request: str) -> Any:
        """Send one line, wait for one line of JSON. ChildProcessError, with its last words, where it has ended, or has
        no answer in time and is killed."""
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
        """What it says up to the end of a line, or to its own end."""
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
        """The status of one that is about to end; it may take `CLOSING` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(CLOSING)
        self.kill()
        return self.process.wait()
