"""Updates of fixed groups by this trainer, with all sharing on and off; and arms in a process of their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import model as bench_model
from vlmr1.config import GRPOConfig
from vlmr1.trainer import GRPOTrainer
from vlmr1.types import Group

BETA = 0.04
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
        packs = [self.trainer.with_reference(pack) for pack in self.trainer.pack(self.groups)[0]]
        return self.trainer.backward(self.model, packs, self.groups)[0]


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
    """An arm in a process of its own that stays up; `benchmarks.peers.steps` is the other end. What it says on standard
    error goes to `log`, where one is given."""

    def __init__(self, command: Sequence[str], log: Path | None = None):
        self.log = log
        with open(log, "w", encoding="utf-8") if log else nullcontext() as errors:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            self.process = subprocess.Popen(command, text=True, **pipes)

    def ask(self, request: str) -> Any:
        """Send one line, wait for one line of JSON. ChildProcessError, with its last words, where it has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        answer = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        if not answer:
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if self.log else []
            raise ChildProcessError(": ".join([f"its process ended with status {self.process.wait()}", *said]))
        return json.loads(answer)

    def close(self) -> None:
        """End the process by closing its input."""
        with suppress(BrokenPipeError):
            self.process.communicate()
