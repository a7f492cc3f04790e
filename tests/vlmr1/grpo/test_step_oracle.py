"""The whole step against its oracle: the naive trainer (padded sequences, image repeated) gives the same loss, the
same metrics and the same gradient of every parameter as the shared one, in float32, to 1e-5 relative."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.maker import Maker
from tests.helpers.slow import mostly_slow
from tests.helpers.steps import NAIVE, assert_equal_steps, near_the_policy, step, trainer_of
from tests.helpers.updates import Step, backward, generate
from vlmr1.models import load_model
from vlmr1.tiny import CHECKPOINT
from vlmr1.types import Group
from vlmr1_kernels.testing import relative_error


@pytest.fixture
def model(model: Any) -> Any:
    """Random weights, three times as wide as usual: attention is far from uniform, and sums of float32 gradients do
    not cancel as they do in a model that has converged."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return model


LONG = "Where, if anywhere at all, is the digit 3 on this canvas?"
SEVEN = "What is seven?"
CASES: dict[str, list[tuple[Any, ...]]] = {
    "two_lengths": [("Locate the digit 7.", (112,), (5, 9, 3, 12)), (LONG, (140,), (8, 2, 10, 6))],
    "two_images": [("Which of the two has a 4?", (56, 112), (7, 4, 11))],
    "text_beside_images": [
        ("Locate the digit 1.", (84,), (6, 3)),
        (SEVEN, (), (4, 9)),
        ("Locate the digit 2.", (112,), (5, 5)),
    ],
    "text_only": [(SEVEN, (), (4, 9, 2))],
    "length_one": [("Locate the digit 5.", (84,), (1, 6, 1, 3))],
    "all_length_one": [("Locate the digit 5.", (56,), (1, 1))],
    "never_ends": [("Locate the digit 6.", (112,), (3, 48))],
    "nine": [("Locate the digit 0.", (112,), (4, 7, 2, 9, 5, 6, 8, 3, 10))],
    "equal_rewards": [("Locate 8.", (84,), (5, 4, 6), (0.0, 0.0, 0.0)), ("Locate 9.", (56,), (3, 7, 2))],
    "same_image_twice": [("Locate 8.", (84,), (5, 4), (1.0, 0.5)), ("Locate 9, please.", (84,), (3, 7), (0.7, 1.2))],
}
SWITCHES = {
    "all_on": {},
    "no_pack": {"pack": False},
    "no_share_prompt": {"share_prompt": False},
    "no_share_prompt_no_vision": {"share_prompt": False, "share_vision": False},
    "only_share_vision": {"share_prompt": False, "pack": False},
    "split_groups": {"tokens_per_pack": 64},
}
RECOMPUTED = {"old_logprobs": "recompute"}
SEQUENCE = {"importance_sampling_level": "sequence"}
OBJECTIVES = {
    "delta": {"delta": 1.1},
    "sequence_level": SEQUENCE,
    "sequence_level_dapo": {"loss_type": "dapo", **SEQUENCE},
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
    "sequence_truncate": {"importance_sampling_correction": "sequence_truncate", **SEQUENCE, **RECOMPUTED},
    "sequence_mask_kl_in_reward": {"importance_sampling_correction": "sequence_mask", "kl_in_reward": True}
    | RECOMPUTED,
}


def whole_step(model: Any, processor: Any, groups: list[Group], output: Path, **settings: Any) -> Step:
    """As `step`, from scored groups on: advantages, KL in the reward and corrections are the trainer's."""
    trainer = trainer_of(model, processor, output, num_generations=len(groups[0].completions), **settings)
    minibatch = generate(trainer, groups)
    loss, metrics, gradients = backward(trainer, minibatch.groups)
    return loss, metrics | minibatch.metrics, gradients


def groups_of(make: Maker, *cases: str) -> list[Group]:
    return make.groups(*(spec for case in cases for spec in CASES[case]))


@pytest.mark.parametrize("case", mostly_slow([*CASES], "text_beside_images", "two_images", "length_one"))
def test_shared_step_equals_naive(case, make, model, processor, tmp_path):
    """Also with the shipped weights, in float64, where sums that cancel in a converged model hide less (the model's
    norms stay in float32)."""
    groups = groups_of(make, case)
    for each, tolerance in ((model, 1e-5), (load_model(CHECKPOINT, dtype=torch.float64), 1e-6)):
        naive = step(each, processor, groups, tmp_path, **NAIVE)
        assert each is not model or (naive[0] != 0 and naive[1]["kl"] > 1e-3)
        assert_equal_steps(step(each, processor, groups, tmp_path), naive, tolerance)


@pytest.mark.parametrize("switches", mostly_slow(SWITCHES, "no_pack", "only_share_vision", "split_groups"))
def test_every_combination_of_switches_gives_the_same_step(switches, make, model, processor, tmp_path):
    groups = groups_of(make, "text_beside_images", "two_images")
    groups[-1] = replace(groups[-1], completions=groups[-1].completions[:2], advantages=groups[-1].advantages[:2])
    naive = step(model, processor, groups, tmp_path, **NAIVE)
    assert_equal_steps(step(model, processor, groups, tmp_path, **switches), naive)


@pytest.mark.parametrize("settings", mostly_slow(OBJECTIVES, "sequence_level", "entropy", "kl_in_reward_recomputed"))
def test_every_objective_gives_the_same_step(settings, make, model, processor, tmp_path):
    """And another one than without the setting."""
    groups = near_the_policy(make, model, groups_of(make, "two_lengths"))
    naive = whole_step(model, processor, groups, tmp_path, **settings, **NAIVE)
    assert_equal_steps(whole_step(model, processor, groups, tmp_path, **settings), naive)
    plain = {name: value for name, value in settings.items() if name in ("loss_type", "old_logprobs", "num_iterations")}
    _, _, gradients = whole_step(model, processor, groups, tmp_path, **plain)
    different = [name for name, each in gradients.items() if relative_error(each, naive[2][name]) > 1e-3]
    assert len(different) > len(gradients) / 2
