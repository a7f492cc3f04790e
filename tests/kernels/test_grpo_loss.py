from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmr1_kernels import GRPOSettings, group_advantages, grpo_loss

LENGTHS = [3, 1, 7, 2, 5]
Inputs = dict[str, Any]


def rows(lengths: list[int] = LENGTHS, spread: float = 0.5) -> Inputs:
    """Rows whose ratios fall on both sides of every clip."""
    count = sum(lengths)
    logp = -3 * torch.rand(count, dtype=torch.float64)
    return {
        "logp": logp.requires_grad_(),
        "seq_ids": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        "advantages": torch.randn(len(lengths), dtype=torch.float64),
        "old_logp": logp.detach() + spread * torch.randn(count, dtype=torch.float64),
        "ref_logp": logp.detach() + spread * torch.randn(count, dtype=torch.float64),
        "sampling_logp": logp.detach() + spread * torch.randn(count, dtype=torch.float64),
    }


# Settings of the op, and what differs in the oracle's names.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {"loss_type": "bnpo"},
    "dapo, wide clip": {"loss_type": "dapo", "epsilon_low": 0.1, "epsilon_high": 0.4},
    "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 9},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2},
    "gspo": {"loss_type": "gspo"},
    "bnpo at sequence level": {"loss_type": "bnpo", "importance_level": "sequence", "epsilon_high": 0.05},
    "cispo at sequence level": {"loss_type": "cispo", "importance_level": "sequence", "epsilon_high": 1.05},
    "two-sided clip": {"delta": 1.3},
    "k1": {"beta": 0.3, "kl": "k1"},
    "k2": {"beta": 0.3, "kl": "k2"},
    "k3": {"beta": 0.3, "kl": "k3"},
    "truncated importance sampling": {"tis_cap": 1.1, "beta": 0.2, "loss_type": "dapo"},
    "gspo with everything": {"loss_type": "gspo", "tis_cap": 1.1, "beta": 0.2, "delta": 1.2},
}
ORACLE_NAMES = {"epsilon_low": "low", "epsilon_high": "high", "max_completion_length": "max_length"}


def oracle_settings(settings: dict[str, Any]) -> dict[str, Any]:
    names = {ORACLE_NAMES.get(name, name): value for name, value in settings.items()}
    if "importance_level" in names:
        names["sequence"] = names.pop("importance_level") == "sequence"
    return names


@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_equals_the_padded_formula(
    settings: dict[str, Any], on_policy: bool, padded_objective: Callable[..., Tensor]
) -> None:
    inputs = rows()
    if on_policy:
        inputs["old_logp"] = None
    loss, _ = grpo_loss(**inputs, settings=GRPOSettings(**settings))
    expected = padded_objective(
        inputs["logp"],
        LENGTHS,
        inputs["advantages"],
        old=inputs["old_logp"],
        ref=inputs["ref_logp"],
        sampling=inputs["sampling_logp"],
        **oracle_settings(settings),
    )
    torch.testing.assert_close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(x, inputs["logp"])[0] for x in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_losses_of_packs_add_up(settings: dict[str, Any]) -> None:
    inputs, chosen = rows(), GRPOSettings(**settings)
    by_sequence = chosen.loss_type in ("grpo", "gspo", "dr_grpo")
    total = len(LENGTHS) if by_sequence else sum(LENGTHS)
    whole, _ = grpo_loss(**inputs, settings=chosen)
    cut, sequences = sum(LENGTHS[:2]), 2
    first = {name: value[: sequences if name == "advantages" else cut] for name, value in inputs.items()}
    second = {name: value[sequences if name == "advantages" else cut :] for name, value in inputs.items()}
    second["seq_ids"] = second["seq_ids"] - sequences
    parts = [grpo_loss(**part, settings=chosen, normalizer=total)[0] for part in (first, second)]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    with_tensor, _ = grpo_loss(**inputs, settings=chosen, normalizer=torch.tensor(float(total)))
    torch.testing.assert_close(with_tensor, whole)


def test_metrics() -> None:
    logp = torch.tensor([-1.0, -2.0, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-2.0, -1.0, -1.0, -2.9], dtype=torch.float64)  # ratios e, 1/e, 1, e^-0.1
    ref = torch.tensor([-1.0, -2.0, -2.0, -3.0], dtype=torch.float64)
    ids, advantages = torch.tensor([0, 1, 1, 1]), torch.tensor([1.0, -1.0], dtype=torch.float64)
    _, metrics = grpo_loss(logp, ids, advantages, old_logp=old, ref_logp=ref)
    assert {name: value.tolist() for name, value in metrics.items()} == {
        "kl": pytest.approx((2.718281828**-1 + 1 - 1) / 4),
        "clip_low": 0.25,
        "clip_high": 0.25,
        "ratio_max": pytest.approx(2.718281828),
        "logp": [-1.0, -2.0, -1.0, -3.0],
        "tokens": 4,
        "dropped_rows": 0,
    }
    assert not any(value.requires_grad for value in metrics.values())
    assert grpo_loss(logp, ids, advantages)[1]["kl"].item() == 0


def test_one_token_on_policy_has_the_policy_gradient() -> None:
    logp = torch.tensor([-0.7], dtype=torch.float64, requires_grad=True)
    loss, _ = grpo_loss(logp, torch.tensor([0]), torch.tensor([2.5], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss, logp)
    assert (loss.item(), gradient.tolist()) == (-2.5, [-2.5])


def test_rewards_in_place_of_advantages() -> None:
    inputs = rows([2, 1, 3, 2])
    del inputs["advantages"]
    rewards = torch.tensor([1.0, 0.0, 0.25, 0.5], dtype=torch.float64)
    loss, _ = grpo_loss(**inputs, rewards=rewards, num_generations=2)
    expected, _ = grpo_loss(**inputs, advantages=group_advantages(rewards, 2))
    assert loss.item() == expected.item()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo"])
def test_equal_rewards_and_no_rows_give_zero(loss_type: str) -> None:
    settings = GRPOSettings(loss_type=loss_type)
    inputs = rows([2, 1, 3, 2])
    inputs["advantages"] = None
    loss, _ = grpo_loss(**inputs, rewards=torch.full((4,), 0.1), num_generations=4, settings=settings)
    assert (loss.item(), torch.autograd.grad(loss, inputs["logp"])[0].abs().max().item()) == (0, 0)
    nothing = torch.empty(0, requires_grad=True)
    loss, metrics = grpo_loss(nothing, torch.empty(0, dtype=torch.long), torch.ones(2), settings=settings)
    assert (loss.item(), torch.autograd.grad(loss, nothing)[0].numel(), metrics["tokens"].item()) == (0, 0, 0)


def test_a_sequence_without_rows_counts_in_the_mean() -> None:
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, _ = grpo_loss(logp, torch.tensor([0, 2]), torch.tensor([1.0, 5.0, 2.0]))
    assert loss.item() == pytest.approx(-(1 + 0 + 2) / 3)
    sequence_level = GRPOSettings(loss_type="gspo")
    loss, _ = grpo_loss(logp, torch.tensor([0, 2]), torch.tensor([1.0, 5.0, 2.0]), settings=sequence_level)
    gradient = torch.autograd.grad(loss, logp)[0].tolist()
    assert gradient == pytest.approx([-1 / 3, -2 / 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"advantages": None}, "either advantages or rewards"),
        ({"num_generations": 2}, "num_generations goes with rewards"),
        ({"advantages": None, "rewards": torch.ones(5)}, "rewards needs num_generations"),
        ({"seq_ids": torch.zeros(4, dtype=torch.long)}, r"seq_ids must be \[18\]"),
        ({"seq_ids": torch.zeros(18)}, "seq_ids must be int64 or int32"),
        ({"old_logp": torch.zeros(17)}, r"old_logp must be \[18\]"),
        ({"old_logp": torch.zeros(18, requires_grad=True)}, "old_logp requires a gradient"),
        ({"ref_logp": None, "settings": GRPOSettings(beta=0.1)}, "ref_logp is needed"),
        ({"sampling_logp": None, "settings": GRPOSettings(tis_cap=2.0)}, "sampling_logp is needed"),
        ({"settings": GRPOSettings(entropy_coef=0.1)}, "entropy_coef needs the logits"),
        ({"normalizer": 0}, "normalizer must be above 0"),
        ({"advantages": torch.ones(4), "check": True}, r"seq_ids must be in 0..3"),
        ({"seq_ids": torch.arange(18) % 5, "check": True}, "seq_ids is not sorted"),
        ({"old_logp": torch.full((18,), torch.nan), "check": True}, "old_logp holds NaN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo_loss(**{**rows(), **change})
