"""The arms of the step benchmark: vlmr1 with all sharing on, with all off, and TRL; here or in a worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import model as bench_model
from benchmarks.peers.trl import TRLArm
from vlmr1.config import GRPOConfig
from vlmr1.loss import Objective, normalizer
from vlmr1.memory.telemetry import Phases
from vlmr1.models.adapter import ImageFeatures
from vlmr1.models.attention import PackedAttention
from vlmr1.trainer import GRPOTrainer
from vlmr1.types import Group

BETA = 0.04
SWITCHES: dict[str, dict[str, Any]] = {
    "shared": {"share_vision": True, "share_prompt": True, "pack": True},
    "naive": {"share_vision": False, "share_prompt": False, "pack": False},
    # Nothing is shared, and yet the kernels are those of the shared arm.
    "repeated": {"share_vision": False, "share_prompt": False, "pack": True},
}
ARMS = (*SWITCHES, "trl")


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


def make(name: str, folder: Path, prompts: int, shape: bench_model.Shape, beta: float = BETA) -> Arm:
    """The arm of this name, in this process, on the model in `folder`."""
    model, processor = bench_model.read(folder)
    groups = bench_model.groups(folder, model, processor, prompts, shape)
    output = folder / "output" / name
    if name == "trl":
        return TRLArm(model, processor, groups, beta, output)
    return OurArm(name, model, processor, groups, output, beta=beta, skip_zero_advantage=False)


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


def phases(arm: OurArm) -> dict[str, float]:
    """Seconds of a shared update by phase, its graph cut where one phase hands over to the next."""
    trainer, model, clock = arm.trainer, arm.model, Phases()
    model.zero_grad(set_to_none=True)
    objective = Objective(trainer.settings, normalizer(arm.groups, trainer.settings))
    with clock("pack"):
        packs, _ = trainer.pack(arm.groups)
    for pack in packs:
        with clock("reference"):
            pack = trainer.with_reference(pack)
        ids, positions = pack.input_ids[None].to(model.device), pack.positions[:, None].to(model.device)
        with clock("vision"):
            features = trainer.adapter.encode_images(model, pack.images)
        cut = [_leaves(image) for image in features]
        with clock("decoder"):
            shared = PackedAttention(pack.layout)
            hidden = trainer.adapter.hidden(model, ids, positions, [cut[i] for i in pack.image_ids], shared=shared)
            rows = hidden[0].index_select(0, pack.rows.to(model.device))  # [N, D]
        leaf = rows.detach().requires_grad_()
        with clock("loss and its gradient"):
            objective.fused(leaf, trainer.adapter.head(model), pack)[0].backward()
        with clock("decoder backward"):
            rows.backward(leaf.grad)
        with clock("vision backward"):
            made, gradients = ([t for image in images for t in image.tensors()] for images in (features, cut))
            torch.autograd.backward(made, [t.grad for t in gradients])  # type: ignore[arg-type]
    return clock.seconds


def _leaves(image: ImageFeatures) -> ImageFeatures:
    rows, *deepstack = (each.detach().requires_grad_() for each in image.tensors())
    return ImageFeatures(rows, tuple(deepstack))


class Worker:
    """An arm in a process of its own that stays up; `serve` is the other end."""

    def __init__(self, command: Sequence[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: str) -> Any:
        """Send one line, wait for one line of JSON."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ChildProcessError(f"{' '.join(self.process.args)} ended with {self.process.wait()}")  # type: ignore[arg-type]
        return json.loads(answer)

    def close(self) -> None:
        """End the process by closing its input."""
        self.process.communicate()


def serve(arm: Arm, answers: Any) -> None:
    """Answer the lines "figures" and "seconds" on standard input until it ends."""
    for line in sys.stdin:
        request = {"figures": figures, "seconds": seconds}[line.strip()]
        print(json.dumps(request(arm)), file=answers, flush=True)
