"""An arm of the suite: `GRPOTrainer` with the settings of one arm, on the model that all arms share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.harness import CheckFailed, require_equal
from benchmarks.model import spread
from benchmarks.step_arms import BETA, as_drawn
from benchmarks.suite.ablation import Arm, kernels_of
from benchmarks.suite.bed import Bed
from benchmarks.suite.timeline import Trainer
from vlmr1.config import GRPOConfig
from vlmr1.grpo.reference import Reference
from vlmr1.grpo.setup import make_policy
from vlmr1.types import Group
from vlmr1_kernels import use

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative, of loss and gradient norm
ROLLOUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # nats a token, of a mean over completions
NARROW = {"model_dtype": "bfloat16", "bf16": True, "optim": "adamw_torch_8bit", "stochastic_rounding": True}


class TrainerArm:
    """Steps and updates by the trainer's own methods. A pass that runs out of memory is made again in smaller packs, as
    in training; whole steps run with the bed's optimizer."""

    def __init__(self, bed: Bed, arm: Arm):
        self.bed, self.arm = bed, arm
        bed.model.requires_grad_(True)  # an arm before may have left its tower frozen
        config = GRPOConfig(
            output_dir=str(bed.folder / "output" / arm.name),
            use_cpu=bed.device == "cpu",
            num_generations=bed.shape.num_generations,
            prompts_per_device=len(bed.prompts),
            max_completion_length=bed.shape.completion_length,
            beta=0.0,  # the reference is the bed's: the trainer makes no copy of its own
            kernels=kernels_of(arm),
            reward_workers=0,
            report_to="none",
            memory_by_phase=False,  # high-water marks are read around the whole step
            **{"skip_zero_advantage": False, **arm.config},
            **(NARROW if bed.dtype == torch.bfloat16 else {}),
        )
        rewards = half_flat(bed.shape.num_generations) if arm.flat else spread
        self.trainer = Trainer(bed.model, config, [], bed.processor, reward_funcs=[rewards])
        self.frozen = [parameter for parameter in bed.model.parameters() if not parameter.requires_grad]
        if arm.kl:
            self.trainer.settings = replace(self.trainer.settings, beta=BETA)
            reference = bed.reference(frozen_tower=bool(self.frozen))
            self.trainer.reference = Reference(make_policy(self.trainer, reference), bed.model)
        self.model = bed.prepare(self.trainer)  # after the copy, as in training
        self.logp_difference = 0.0  # of the last step: the engine's log-probs of its completions and the policy's

    def enter(self) -> None:
        """The shared model as this arm trains it, without gradients."""
        self.model.requires_grad_(True)
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        self.model.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Images and prompts from their files, rollout, reward, reference, forward, backward, optimizer."""
        self.enter()
        self.trainer.training_step(self.model, self.bed.read())
        self.bed.optimize()
        self.trainer.end_update()
        self.logp_difference = self.trainer.pending.steps[-1].values.get("rollout/logp_difference", 0.0)
        self.trainer.pending.steps.clear()
        drawn = {len(c.token_ids) for group in self.trainer.last_groups for c in group.completions}
        if drawn != {self.bed.shape.completion_length}:
            raise CheckFailed(f"{self.arm.name}: completions of {sorted(drawn)} tokens were drawn")

    def update(self, groups: Sequence[Group]) -> float:
        """Reference, forward and backward of fixed groups; gradients are left there. Returns the loss."""
        trainer = self.trainer
        self.enter()
        trainer.begin_update()
        with use(trainer.args.kernels):
            own = as_drawn(groups)
            trainer.add_logprobs(self.model, own)
            loss, _ = trainer.backward(self.model, own)
        if trainer.features is not None:
            trainer.features.clear()
        return float(loss)

    def figures(self, groups: Sequence[Group]) -> dict[str, float]:
        """What arms must agree on: loss and gradient norm of an update."""
        loss = self.update(groups)
        norms = [parameter.grad.float().norm() for parameter in self.model.parameters() if parameter.grad is not None]
        norm = float(torch.stack(norms).norm())
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss, "grad_norm": norm}

    def phases(self) -> Mapping[str, float]:
        return self.trainer.phases.seconds

    @property
    def note(self) -> str:
        """The arm's, and whether memory ran out."""
        budget = self.trainer.runner.budget
        cut = f"memory ran out: packs of {budget.tokens} tokens" if budget.out_of_memory else ""
        return "; ".join(filter(None, (self.arm.note, cut)))


def check(figures: Mapping[str, Mapping[str, float]], bases: Mapping[str, str], dtype: torch.dtype) -> None:
    """CheckFailed unless each arm's figures are those of its base."""
    for base in dict.fromkeys(bases.values()):
        family = [base, *(name for name in figures if bases[name] == base and name != base)]
        require_equal({name: figures[name] for name in family}, TOLERANCE[dtype])


def check_rollout(name: str, arm: TrainerArm) -> None:
    """CheckFailed where the engine drew its completions from another distribution than the policy's."""
    limit = ROLLOUT_TOLERANCE[arm.bed.dtype]
    if not arm.logp_difference <= limit:
        raise CheckFailed(f"{name}: log-probs of rollout and policy differ by {arm.logp_difference:.2g} nats a token")


def half_flat(size: int) -> Callable[..., list[float]]:
    """Rewards that are equal within every second group of this size, and differ within the others."""

    def half_flat(completions: list, **_: Any) -> list[float]:
        return [0.0 if index // size % 2 else float(index % size % 3) for index in range(len(completions))]

    return half_flat
