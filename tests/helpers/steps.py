"""Loss, metrics and gradients of one update, and their comparison with the naive trainer's."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.maker import Maker
from tests.helpers.updates import Step, update
from vlmr1.config import GRPOConfig
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.types import Group

TOLERANCE = 1e-5
NAIVE = {"share_vision": False, "share_prompt": False, "pack": False}


def trainer_of(model: Any, processor: Any, output: Path, rewards: Any = ("format",), **settings: Any) -> GRPOTrainer:
    """A trainer without data; its reference model, where it has one, differs from the policy."""
    given = {"use_cpu": True, "num_generations": 2, "beta": 0.04} | settings
    config = GRPOConfig(output_dir=str(output), **given)
    trainer = GRPOTrainer(copy.deepcopy(model), config, [], processor, reward_funcs=list(rewards))
    if trainer.reference is not None:
        torch.manual_seed(1)
        for parameter in trainer.reference.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trainer.accelerator.prepare(trainer.model)
    return trainer


def step(model: Any, processor: Any, groups: list[Group], output: Path, **settings: Any) -> Step:
    return update(trainer_of(model, processor, output, **settings), groups)


def near_the_policy(make: Maker, model: Any, groups: list[Group], noise: float = 0.3) -> list[Group]:
    """The groups with rewards, and with an engine's log-probs that are the model's and noise."""
    policy = PackedPolicy(model, make.family, temperature=1.0)
    out = []
    for group in groups:
        sizes = [len(c.token_ids) for c in group.completions]
        pack = make_pack([group])
        noisy = policy.logprobs(pack) + noise * torch.randn(sum(sizes), generator=make.random)
        parts = zip(group.completions, noisy.split(sizes), strict=True)
        completions = tuple(replace(c, logp=logp, sampling_logp=logp + 0.5) for c, logp in parts)
        rewards = torch.rand(len(sizes), 1, generator=make.random)
        out.append(replace(group, completions=completions, rewards=rewards, advantages=None))
    return out


def assert_equal_steps(one: Step, other: Step, tolerance: float = TOLERANCE) -> None:
    (loss, metrics, gradients), (loss_, metrics_, gradients_) = one, other
    assert loss == pytest.approx(loss_, rel=tolerance)
    assert metrics == pytest.approx(metrics_, rel=tolerance, abs=1e-9)
    assert gradients.keys() == gradients_.keys()
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    for name, gradient in gradients.items():
        scale = max(float(gradient.norm()), 1e-3 * float(total))
        assert float((gradient - gradients_[name]).norm()) <= tolerance * scale, name
