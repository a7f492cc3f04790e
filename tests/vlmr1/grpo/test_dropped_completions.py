"""Completions of advantage 0, and truncated ones where these are masked, leave the policy pass."""

import pytest
import torch

from tests.helpers.maker import Maker
from tests.helpers.steps import NAIVE, TOLERANCE
from tests.helpers.trainers import relative, trainer_of
from tests.helpers.updates import update
from vlmr1.config import GRPOConfig
from vlmr1.grpo.packing import make_pack, with_signal
from vlmr1.types import Group


def groups_of(make: Maker) -> list[Group]:
    """A group without signal, one with some in three of four completions, one with signal everywhere."""
    return make.groups(
        ("Locate the digit 8.", (84,), (5, 4, 6), (0.0, 0.0, 0.0)),
        ("Locate the digit 9.", (56,), (3, 7, 2, 4), (1.0, 0.0, -0.25, 0.5)),
        ("What is seven?", (), (6, 5), (0.7, 0.3)),
    )


def step(model, processor, output, groups, **settings):
    """Loss, metrics, gradients and the rows of the packs."""
    trainer = trainer_of(model, processor, output, beta=0.0, **settings)
    return *update(trainer, groups), sum(len(pack.targets) for pack in trainer.runner.packs(groups))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "gspo"])
def test_loss_and_gradients_are_those_of_all_rows(loss_type, model, processor, make, tmp_path):
    groups = groups_of(make)
    settings = {"loss_type": loss_type, "epsilon_high": 5.0 if loss_type == "cispo" else 0.2}
    loss, metrics, gradients, rows = step(model, processor, tmp_path, groups, **settings)
    settings |= NAIVE | {"skip_zero_advantage": False}
    loss_, metrics_, gradients_, rows_ = step(model, processor, tmp_path, groups, **settings)
    assert (rows, rows_) == (3 + 2 + 4 + 6 + 5, 42)
    assert loss == pytest.approx(loss_, rel=TOLERANCE) and loss != 0
    assert relative(gradients, gradients_) < TOLERANCE
    assert (metrics["tokens"], metrics["dropped_rows"]) == (42, 22)
    assert (metrics_["tokens"], metrics_["dropped_rows"]) == (42, 0)


def test_metrics_are_means_over_the_rows_that_are_left(model, processor, make, tmp_path):
    groups = groups_of(make)
    _, metrics, _, _ = step(model, processor, tmp_path, groups)
    left = with_signal(groups, skip_zero_advantage=True, mask_truncated=False)
    _, expected, _, _ = step(model, processor, tmp_path, left, skip_zero_advantage=False)
    assert expected["dropped_rows"] == 0
    for name in ("entropy", "clip_low", "clip_high", "ratio_max"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-6)
    _, every, _, _ = step(model, processor, tmp_path, groups, skip_zero_advantage=False)
    assert metrics["entropy"] != pytest.approx(every["entropy"], rel=1e-3)


def test_a_step_without_signal_runs_one_pass_of_zero_weight(model, processor, make, tmp_path):
    """Gradients are zeros, as without skipping, and not absent: optimizers with momentum still move."""
    groups = groups_of(make)[:1] * 2
    loss, metrics, gradients, rows = step(model, processor, tmp_path, groups)
    _, _, expected, _ = step(model, processor, tmp_path, groups, skip_zero_advantage=False)
    assert (loss, rows, metrics["dropped_rows"]) == (0, 5, 30)  # no row counts, the one that is computed neither
    assert gradients.keys() == expected.keys()
    assert all(not gradient.any() for gradient in gradients.values())


def test_a_group_without_images_can_be_what_is_left(model, processor, make, tmp_path):
    """The tower gets no gradient from text: what is left of the step has to say so as the whole step does."""
    groups = [groups_of(make)[0], groups_of(make)[2]]
    _, _, gradients, _ = step(model, processor, tmp_path, groups)
    _, _, expected, _ = step(model, processor, tmp_path, groups, skip_zero_advantage=False)
    tower = {name for name in expected if "visual" in name}
    assert tower and all(not expected[name].any() and not gradients[name].any() for name in tower)
    assert relative(gradients, expected) < TOLERANCE


SKIPPED = {
    "beta 0": ({"beta": 0.0}, True),
    "beta": ({"beta": 0.04}, False),
    "off": ({"beta": 0.0, "skip_zero_advantage": False}, False),
    "entropy bonus": ({"beta": 0.0, "entropy_coef": 0.1}, False),
    "KL in the reward": ({"beta": 0.04, "kl_in_reward": True}, True),
}


@pytest.mark.parametrize(("settings", "expected"), SKIPPED.values(), ids=SKIPPED.keys())
def test_on_where_the_advantage_is_the_only_source(settings, expected, tmp_path):
    assert GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings).skips_zero_advantage == expected


# mask_truncated_completions: what met the length limit leaves the loss, the KL included


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_truncated_completions_have_no_part(loss_type, model, processor, make, tmp_path):
    """The longest of a group is truncated. The loss written out over the others: per-token losses at ratio r of the
    rollout's log-probs, no KL."""
    trainer = trainer_of(model, processor, tmp_path, mask_truncated_completions=True, loss_type=loss_type, beta=0.0)
    some = ("Locate the digit 9.", (56,), (3, 7, 2), (1.0, 0.4, -0.5))
    groups = make.groups(some, ("What is seven?", (), (6, 5), (0.7, 0.3)))
    loss, metrics, _ = update(trainer, groups)
    logp = trainer.policy.logprobs(make_pack(groups)).split([3, 7, 2, 6, 5])
    terms = []
    for row, i, advantage in ((0, 0, 1.0), (2, 2, -0.5), (4, 1, 0.3)):
        old = groups[row // 3].completions[i].logp
        ratio = (logp[row] - old).exp()
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    expected = {
        "grpo": sum(term.mean() for term in terms) / 5,
        "dapo": torch.cat(terms).sum() / (3 + 2 + 5),
        "dr_grpo": torch.cat(terms).sum() / (5 * 8),
    }[loss_type]
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert (metrics["tokens"], metrics["dropped_rows"]) == (23, 13)


def test_where_all_are_truncated_nothing_moves(model, processor, make, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, mask_truncated_completions=True, beta=1.0)
    groups = make.groups(("Locate the digit 9.", (56,), (4, 4), (1.0, -1.0)))
    for parameter in trainer.reference.model.parameters():
        parameter.mul_(1.1)
    loss, _, gradients = update(trainer, groups)
    assert loss == 0 and gradients.keys() == dict(trainer.model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients.values())
    assert update(trainer_of(model, processor, tmp_path, beta=1.0), groups)[0] != 0
