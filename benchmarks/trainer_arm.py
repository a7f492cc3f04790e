"""Our arms: `GRPOTrainer` with the settings of one arm, on the model, reference and optimizer that all arms share."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

from benchmarks import model as bench_model
from benchmarks.harness import CheckFailed, Clock, PeakMemory
from benchmarks.model import Shape
from benchmarks.planned import step_settings
from vlmr1.config import GRPOConfig
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.models import family_of
from vlmr1.rollout.engine import RolloutStats
from vlmr1.types import Group

LEARNING_RATE = 1e-6
LOGP_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # nats a token, of a mean over completions


class Bed:
    """Model, reference and optimizer of all arms. Weights are float32; `dtype` is what the passes compute in."""

    def __init__(self, folder: Path, shape: Shape, device: str, dtype: str):
        self.folder, self.shape, self.device, self.dtype = folder, shape, device, dtype
        self.model, self.processor = bench_model.build(folder, shape, device=device)
        if shape.checkpointing:
            bench_model.use_checkpointing(self.model)
        self.groups = bench_model.groups_of(self.prompts(), shape)
        self.reference: Any = copy.deepcopy(self.model).eval().requires_grad_(False)
        bench_model.perturb(self.reference)
        self.prepared: Any = None  # the model as an accelerator wraps it; the first arm's, a second would wrap it again
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        for parameter in self.model.parameters():  # the first step makes the moments: gradients of 0 move nothing
            parameter.grad = torch.zeros_like(parameter)
        self.optimize()

    def prompts(self) -> list[Any]:
        """The prompts of a step from their files."""
        return bench_model.prompts_of(self.folder, self.model, self.processor, self.shape)

    def reference_with_tower(self) -> Any:
        """The reference with the policy's own vision tower, as where the tower is frozen."""
        shared = {id(parameter): parameter for parameter in self.reference.parameters()}
        towers = (family_of(model).vision_parameters(model) for model in (self.reference, self.model))
        shared |= {id(own): of_policy for own, of_policy in zip(*towers, strict=True)}
        return copy.deepcopy(self.reference, memo=shared)  # modules only: every parameter is in the memo

    def optimize(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class FixedRollout:
    """A rollout engine that returns given groups, as just drawn: passes keep their log-probs on the completions. All
    else is the engine's own."""

    def __init__(self, engine: Any, groups: Sequence[Group]):
        self._engine, self._groups = engine, groups
        self.stats = RolloutStats(seconds=1.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(self, *_: Any, **__: Any) -> list[Group]:
        return [replace(group, completions=tuple(map(replace, group.completions))) for group in self._groups]


class TrainerArm:
    """Whole steps by the trainer's own `training_step`; the optimizer is the bed's."""

    def __init__(self, name: str, bed: Bed, settings: Mapping[str, Any], *, flat: bool = False, rollout: bool = False):
        """`flat`: every second group has equal rewards. `rollout`: samples are of the rollout alone."""
        self.name, self.bed = name, bed
        self.sample = self.rollout if rollout else self.step
        bed.model.requires_grad_(True)  # an arm before may have left its tower frozen
        given: dict[str, Any] = {"use_cpu": bed.device == "cpu", "bf16": bed.dtype == "bfloat16", "reward_workers": 0}
        given |= {"report_to": "none", "memory_by_phase": False, "disable_tqdm": True, **step_settings(bed.shape)}
        given |= {"old_logprobs": "rollout", **settings}  # so that the ratio of the fixed groups is not 1
        config = GRPOConfig(output_dir=str(bed.folder / "output" / name), **given)
        rewards = bench_model.rewards(bed.shape.num_generations, flat=flat)
        self.trainer: Any = GRPOTrainer(bed.model, config, [], bed.processor, reward_funcs=[rewards])
        self.trainer.engine.ignore_eos = True
        for callback in (PrinterCallback, ProgressCallback):
            self.trainer.remove_callback(callback)
        self.frozen = [parameter for parameter in bed.model.parameters() if not parameter.requires_grad]
        if self.trainer.reference is not None:  # its own copy goes
            model = bed.reference_with_tower() if self.frozen else bed.reference
            self.trainer.reference.forward.model = self.trainer.reference.wrapped = model
        if bed.prepared is None:
            bed.prepared = self.trainer.accelerator.prepare(bed.model)
        self.logs: Mapping[str, float] = {}  # of the last step

    def step(self) -> None:
        """Images and prompts from their files, rollout, reward, reference, forward, backward, optimizer."""
        self._enter()
        self.trainer.training_step(self.bed.prepared, self.bed.prompts())
        self.bed.optimize()
        self._leave()
        limit = LOGP_TOLERANCE[self.bed.dtype]
        if not (difference := self.logs.get("rollout/logp_difference", 0.0)) <= limit:
            raise CheckFailed(f"{self.name}: log-probs of rollout and policy differ by {difference:.2g} nats a token")
        length = self.logs["completion_length"]
        if length != self.bed.shape.completion_length:
            raise CheckFailed(f"{self.name}: completions of {length:g} tokens were drawn")

    def rollout(self) -> None:
        """The rollout alone."""
        self._enter()
        self.trainer.rollout(self.bed.prompts())

    def first(self, clock: Clock) -> tuple[float, float | None]:
        """Seconds and peak memory, in MiB, of a first sample."""
        peak = PeakMemory()
        return clock(self.sample), peak.mib()

    def seconds(self, clock: Clock) -> float:
        return clock(self.sample)

    def figures(self) -> dict[str, float]:
        """Loss and gradient norm of the fixed groups: what arms must agree on."""
        self._enter()
        engine = self.trainer.engine
        self.trainer.engine = FixedRollout(engine, self.bed.groups)
        try:
            loss = float(self.trainer.training_step(self.bed.prepared, self.bed.prompts()))
        finally:
            self.trainer.engine = engine
        norm = bench_model.gradient_norm(self.bed.model)
        self.bed.model.zero_grad(set_to_none=True)
        self._leave()
        return {"loss": loss, "grad_norm": norm}

    def phases(self) -> dict[str, float]:
        """Seconds of the last step by phase."""
        return {name.removeprefix("seconds/"): self.logs[name] for name in self.logs if name.startswith("seconds/")}

    def memory_by_phase(self) -> dict[str, float]:
        """Peak MiB of one more step by phase, above what was held before it."""
        held = PeakMemory().start or 0.0
        self.trainer.args.memory_by_phase = True
        try:
            self.step()
        finally:
            self.trainer.args.memory_by_phase = False
        names = [name for name in self.logs if name.startswith("memory/") and name != "memory/peak_mib"]
        return {name.removeprefix("memory/").removesuffix("_mib"): self.logs[name] - held for name in names}

    def _enter(self) -> None:
        """Make the shared model what this arm trains, without gradients."""
        self.bed.model.requires_grad_(True)
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        self.bed.model.zero_grad(set_to_none=True)

    def _leave(self) -> None:
        """End the update as the training loop does, and take its logs."""
        trainer = self.trainer
        trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
        trainer.log({"loss": 0.0})
        self.logs = trainer.state.log_history.pop()
