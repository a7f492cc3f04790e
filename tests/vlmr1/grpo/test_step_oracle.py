"""The whole step against its oracle: the naive trainer (padded sequences, image repeated) gives the same loss, the
same metrics and the same gradient of every parameter as the shared one, in float32, to 1e-5 relative."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.maker import Maker
from tests.helpers.steps import NAIVE, assert_equal_steps, near_the_policy, step
from tests.helpers.updates import as_drawn
from vlmr1.config import GRPOConfig
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.models import load_model
from vlmr1.tiny import CHECKPOINT
from vlmr1.types import Group


@pytest.fixture
def model(model: Any) -> Any:
    """Random weights, three times as wide as usual: attention is far from uniform, and sums of float32 gradients do
    not cancel as they do in a model that has converged."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return model


def two_lengths(make: Maker) -> list[Group]:
    return [
        make.group(make.prompt("Locate the digit 7.", (112,)), (5, 9, 3, 12)),
        make.group(make.prompt("Where, if anywhere at all, is the digit 3 on this canvas?", (140,)), (8, 2, 10, 6)),
    ]


def two_images(make: Maker) -> list[Group]:
    return [make.group(make.prompt("Which of the two has a 4?", (56, 112)), (7, 4, 11))]


def text_beside_images(make: Maker) -> list[Group]:
    return [
        make.group(make.prompt("Locate the digit 1.", (84,)), (6, 3)),
        make.group(make.prompt("What is seven?"), (4, 9)),
        make.group(make.prompt("Locate the digit 2.", (112,)), (5, 5)),
    ]


def text_only(make: Maker) -> list[Group]:
    return [make.group(make.prompt("What is seven?"), (4, 9, 2))]


def length_one(make: Maker) -> list[Group]:
    return [make.group(make.prompt("Locate the digit 5.", (84,)), (1, 6, 1, 3))]


def all_length_one(make: Maker) -> list[Group]:
    return [make.group(make.prompt("Locate the digit 5.", (56,)), (1, 1))]


def never_ends(make: Maker) -> list[Group]:
    return [make.group(make.prompt("Locate the digit 6.", (112,)), (3, 48))]


def nine(make: Maker) -> list[Group]:
    return [make.group(make.prompt("Locate the digit 0.", (112,)), (4, 7, 2, 9, 5, 6, 8, 3, 10))]


def equal_rewards(make: Maker) -> list[Group]:
    return [
        make.group(make.prompt("Locate the digit 8.", (84,)), (5, 4, 6), (0.0, 0.0, 0.0)),
        make.group(make.prompt("Locate the digit 9.", (56,)), (3, 7, 2)),
    ]


def same_image_twice(make: Maker) -> list[Group]:
    return [
        make.group(make.prompt("Locate the digit 8.", (84,)), (5, 4), (1.0, 0.5)),
        make.group(make.prompt("Locate the digit 9, please.", (84,)), (3, 7), (0.7, 1.2)),
    ]


CASES = [
    two_lengths,
    two_images,
    text_beside_images,
    text_only,
    length_one,
    all_length_one,
    never_ends,
    nine,
    equal_rewards,
    same_image_twice,
]
SWITCHES = {
    "all_on": {},
    "no_pack": {"pack": False},
    "no_share_prompt": {"share_prompt": False},
    "no_share_prompt_no_vision": {"share_prompt": False, "share_vision": False},
    "only_share_vision": {"share_prompt": False, "pack": False},
    "split_groups": {"tokens_per_pack": 64},
}
RECOMPUTED = {"old_logprobs": "recompute"}
OBJECTIVES = {
    "delta": {"delta": 1.1},
    "sequence_level": {"importance_sampling_level": "sequence"},
    "sequence_level_dapo": {"importance_sampling_level": "sequence", "loss_type": "dapo"},
    "entropy": {"entropy_coef": 0.3},
    "entropy_dr_grpo": {"entropy_coef": 0.3, "loss_type": "dr_grpo"},
    "entropy_bnpo": {"entropy_coef": -0.3, "loss_type": "bnpo"},
    "entropy_masked": {"entropy_coef": 0.3, "mask_truncated_completions": True},
    "kl_in_reward": {"kl_in_reward": True},
    # at ratio 1 the loss of grpo is minus the mean advantage: 0
    "kl_in_reward_recomputed": {"kl_in_reward": True, "kl": "k2", "loss_type": "dapo", "num_iterations": 2}
    | RECOMPUTED,
    "token_truncate": {"importance_sampling_correction": "token_truncate", **RECOMPUTED},
    "token_mask": {"importance_sampling_correction": "token_mask", **RECOMPUTED},
    "sequence_truncate": {
        "importance_sampling_correction": "sequence_truncate",
        "importance_sampling_level": "sequence",
        **RECOMPUTED,
    },
    "sequence_mask_kl_in_reward": {"importance_sampling_correction": "sequence_mask", "kl_in_reward": True}
    | RECOMPUTED,
}


def whole_step(model: Any, processor: Any, groups: list[Group], output: Path, **settings: Any) -> tuple:
    """As `step`, from scored groups on: advantages, KL in the reward and corrections are the trainer's."""
    given = {"beta": 0.04, "num_generations": len(groups[0].completions)} | settings
    config = GRPOConfig(output_dir=str(output), use_cpu=True, **given)
    trainer = GRPOTrainer(copy.deepcopy(model), config, [], processor, reward_funcs=["format"])
    if trainer.reference is not None:
        torch.manual_seed(1)
        for parameter in trainer.reference.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trainer.rollout = lambda prompts, number=0: as_drawn(groups)
    trainer.score = lambda groups: groups
    trainer.accelerator.prepare(trainer.model)
    (minibatch,) = trainer.generate(trainer.model, [])
    loss, metrics = trainer.backward(trainer.model, minibatch.groups)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss), metrics | minibatch.metrics, gradients


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_shared_step_equals_naive(case, make, model, processor, tmp_path):
    groups = case(make)
    naive = step(model, processor, groups, tmp_path, **NAIVE)
    assert naive[0] != 0 and naive[1]["kl"] > 1e-3
    assert_equal_steps(step(model, processor, groups, tmp_path), naive)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_every_combination_of_switches_gives_the_same_step(switches, make, model, processor, tmp_path):
    groups = text_beside_images(make) + two_images(make)
    groups[-1] = replace(groups[-1], completions=groups[-1].completions[:2], advantages=groups[-1].advantages[:2])
    naive = step(model, processor, groups, tmp_path, **NAIVE)
    assert_equal_steps(step(model, processor, groups, tmp_path, **switches), naive)


@pytest.mark.parametrize("settings", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_every_objective_gives_the_same_step(settings, make, model, processor, tmp_path):
    """And another one than without the setting."""
    groups = near_the_policy(make, model, two_lengths(make))
    naive = whole_step(model, processor, groups, tmp_path, **settings, **NAIVE)
    assert_equal_steps(whole_step(model, processor, groups, tmp_path, **settings), naive)
    plain = {name: value for name, value in settings.items() if name in ("loss_type", "old_logprobs", "num_iterations")}
    _, _, gradients = whole_step(model, processor, groups, tmp_path, **plain)
    different = [name for name, gradient in gradients.items() if relative(gradient, naive[2][name]) > 1e-3]
    assert len(different) > len(gradients) / 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_shared_step_equals_naive_with_the_shipped_weights(case, make, processor, tmp_path):
    """In float64, where sums that cancel in a converged model hide less (the model's norms stay in float32)."""
    groups, shipped = case(make), load_model(CHECKPOINT, dtype=torch.float64)
    naive = step(shipped, processor, groups, tmp_path, **NAIVE)
    assert_equal_steps(step(shipped, processor, groups, tmp_path), naive, tolerance=1e-6)
