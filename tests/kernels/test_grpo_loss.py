from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_cases import OBJECTIVES, PER_ROW, Target, padded_objective, targets
from tests.helpers.trl import trl_loss
from vlmr1_kernels import GRPOSettings, grpo_loss
from vlmr1_kernels.settings import KL_ESTIMATORS, LOSS_TYPES
from vlmr1_kernels.testing import assert_within_budget, pooled

OP = "grpo_loss"
pytestmark = pytest.mark.usefixtures("poison")

LENGTHS = (3, 1, 7, 2, 5)
Inputs = dict[str, Any]
# The entropy bonus needs the logits: test_linear_grpo_loss.py has the cases as they are.
SETTINGS = {name: replace(settings, entropy_coef=0.0) for name, settings in OBJECTIVES.items()}


def rows(lengths: Sequence[int] = LENGTHS, spread: float = 0.5) -> Inputs:
    """float64, rounded to float32; ratios fall on both sides of every clip."""

    def rounded(values: Tensor) -> Tensor:
        return values.float().double()

    count = sum(lengths)
    logp = rounded(-3 * torch.rand(count, dtype=torch.float64))
    near = {name: rounded(logp + spread * torch.randn(count, dtype=torch.float64)) for name in PER_ROW}
    return {
        "logp": logp.requires_grad_(),
        "seq_ids": torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        "advantages": rounded(torch.randn(len(lengths), dtype=torch.float64)),
        **{name: value.detach() for name, value in near.items()},
    }


def cast(inputs: Inputs, dtype: torch.dtype, device: str = "cpu") -> Inputs:
    """logp in `dtype`, the rest in float32, integers as they are."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = {}
    for name, value in inputs.items():
        out[name] = value
        if isinstance(value, Tensor):
            out[name] = value.detach().to(device, wide if value.is_floating_point() else None)
    out["logp"] = out["logp"].to(dtype).requires_grad_()
    return out


def padded(inputs: Inputs, settings: GRPOSettings, lengths: Sequence[int]) -> Tensor:
    given = {name: inputs[name] for name in PER_ROW}
    logp = inputs["logp"] if inputs["logp"].dtype == torch.float64 else inputs["logp"].float()
    return padded_objective(logp, tuple(lengths), inputs["advantages"], settings, **given)


def with_gradient(loss: Tensor, inputs: Inputs) -> list[Tensor]:
    return [loss.detach(), torch.autograd.grad(loss, inputs["logp"])[0]]


def check_budget(target, dtype, settings: GRPOSettings, draws: Sequence[Inputs], lengths: Sequence[int]) -> None:
    run = target.run(dtype)
    # The oracle sees what the dtype can hold.
    exact = [draw | {"logp": draw["logp"].detach().to(dtype).double().requires_grad_()} for draw in draws]

    def ours(inputs: Inputs) -> list[Tensor]:
        loss, metrics = run(**inputs, settings=settings)
        assert (loss.dtype, metrics["logp"].dtype) == (torch.float32, torch.float32)
        return with_gradient(loss, inputs)

    assert_within_budget(
        ("loss", "d_logp"),
        pooled(ours(cast(draw, dtype, target.device)) for draw in exact),
        pooled(with_gradient(padded(each, settings, lengths), each) for each in (cast(d, dtype) for d in exact)),
        pooled(with_gradient(padded(draw, settings, lengths), draw) for draw in exact),
    )


def test_the_objectives_cover_every_loss_type_kl_and_entropy() -> None:
    with_kl = {(each.loss_type, each.kl) for each in OBJECTIVES.values() if each.beta > 0}
    assert with_kl == set(product(LOSS_TYPES, KL_ESTIMATORS))
    with_bonus = {(each.loss_type, each.entropy_coef != 0) for each in OBJECTIVES.values()}
    assert with_bonus == set(product(LOSS_TYPES, (False, True)))


TRLS = {name: settings for name, settings in SETTINGS.items() if settings.beta == 0 or settings.kl == "k3"}


@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
@pytest.mark.parametrize("settings", TRLS.values(), ids=TRLS.keys())
def test_the_padded_formula_is_that_of_trl(settings: GRPOSettings, on_policy: bool) -> None:
    """With the estimator of the KL that TRL has; every implementation is compared with the formula below."""
    assert {each.loss_type for each in TRLS.values()} == set(LOSS_TYPES)
    inputs = rows()
    if on_policy:
        settings, inputs["old_logp"] = replace(settings, tis_cap=None), None
    found, expected = padded(inputs, settings, LENGTHS), trl_loss(settings, list(LENGTHS), inputs)
    torch.testing.assert_close(with_gradient(found, inputs), with_gradient(expected, inputs))


@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_reference_equals_the_padded_formula(settings: GRPOSettings, on_policy: bool) -> None:
    inputs = rows()
    if on_policy:
        inputs["old_logp"] = None
    loss, _ = grpo_loss(**inputs, settings=settings, impl="reference")
    expected = padded(inputs, settings, LENGTHS)
    torch.testing.assert_close(with_gradient(loss, inputs), with_gradient(expected, inputs))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_error_is_within_budget(target: Target, settings: GRPOSettings) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check_budget(target, dtype, settings, [rows() for _ in range(4)], LENGTHS)


@pytest.mark.parametrize("name", ["grpo", "cispo, k3, rollout correction", "gspo, k1", "dr_grpo, k3, two-sided clip"])
def test_error_is_within_budget_on_policy(target: Target, name: str) -> None:
    on_policy = [rows() | {"old_logp": None} for _ in range(4)]
    check_budget(target, torch.float32, SETTINGS[name], on_policy, LENGTHS)


@pytest.mark.parametrize("name", ["grpo", "gspo, k2", "dr_grpo, k3, two-sided clip"])
def test_more_rows_than_a_grid_dimension_holds(target: Target, name: str) -> None:
    lengths = (1, 40_000, 0, 17, 30_001)
    check_budget(target, torch.float32, SETTINGS[name], [rows(lengths) for _ in range(2)], lengths)


def test_metrics(target: Target) -> None:
    def values(*numbers: float) -> Tensor:
        return torch.tensor(numbers, device=target.device)

    run, logp = target.run(torch.float32), values(-1.0, -2.0, -1.0, -2.0, -3.0).requires_grad_()
    old, ref = values(-2.0, -1.0, -2.0, -1.0, -3.0), values(-1.0, -2.0, -1.0, -2.0, -4.0)  # ratios e, 1/e, e, 1/e, 1
    ids, advantages = torch.tensor([0, 0, 1, 1, 1], device=target.device), values(1.0, -1.0)
    _, metrics = run(logp, ids, advantages, old_logp=old, ref_logp=ref)
    assert {name: value.tolist() for name, value in metrics.items()} == {
        "kl": pytest.approx((2.718281828**-1 + 1 - 1) / 5),
        "clip_low": pytest.approx(0.2),
        "clip_high": pytest.approx(0.2),
        "ratio_max": pytest.approx(2.718281828),
        "logp": [-1.0, -2.0, -1.0, -2.0, -3.0],
        "tokens": 5,
        "dropped_rows": 0,
    }
    _, capped = run(logp, ids, advantages, old_logp=old, settings=GRPOSettings(loss_type="cispo", epsilon_high=1.3))
    assert [capped[name].item() for name in ("clip_low", "clip_high")] == [0, pytest.approx(0.2)]
    assert not any(value.requires_grad for value in metrics.values())
    assert run(logp, ids, advantages)[1]["kl"].item() == 0


@pytest.mark.parametrize("name", ["grpo, two-sided clip", "gspo, k1", "cispo, k2, entropy"])
def test_metrics_are_those_of_the_reference(target: Target, name: str) -> None:
    inputs = rows()
    _, expected = grpo_loss(**inputs, settings=SETTINGS[name], impl="reference")
    _, metrics = target.run(torch.float32)(**cast(inputs, torch.float32, target.device), settings=SETTINGS[name])
    torch.testing.assert_close(metrics, expected, check_dtype=False, check_device=False, rtol=1.3e-6, atol=1e-5)
    assert {value.dtype for value in metrics.values()} <= {torch.float32, torch.int64}


@pytest.mark.parametrize("epsilon", [(0.2, 0.2), (0.0, 0.2), (0.2, 0.0), (0.0, 0.0)], ids=str)
@pytest.mark.parametrize("on_policy", [True, False], ids=["on-policy", "ratio 1"])
def test_ties_of_the_clip_pass_the_whole_gradient(target: Target, epsilon: tuple[float, float], on_policy) -> None:
    logp = torch.tensor([-1.0, -2.0, -0.5], device=target.device, requires_grad=True)
    ids, advantages = (torch.tensor(each, device=target.device) for each in ([0, 0, 1], [2.0, -3.0]))
    old = None if on_policy else logp.detach().clone()
    settings = GRPOSettings(epsilon_low=epsilon[0], epsilon_high=epsilon[1])
    loss, _ = target.run(torch.float32)(logp, ids, advantages, old_logp=old, settings=settings)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert (loss.item(), gradient.tolist()) == (0.5, [-0.5, -0.5, 1.5])


@pytest.mark.parametrize("target", targets(OP, only=("native", "triton")))
@pytest.mark.parametrize("gap", [1e-4, -3e-2, 0.3, -2.0])
def test_kl_near_its_zero(target: Target, gap: float) -> None:
    logp = torch.full((7,), -1.25, device=target.device)
    ids, nothing = torch.zeros(7, dtype=torch.int32, device=target.device), torch.zeros(1, device=target.device)
    ref, settings = logp + gap, GRPOSettings(beta=1.0)
    _, metrics = target.run(torch.float32)(logp, ids, nothing, ref_logp=ref, settings=settings)
    d = (ref.double() - logp.double())[0]
    assert metrics["kl"].item() == pytest.approx((torch.expm1(d) - d).item(), rel=2e-6)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo"])
def test_no_rows_give_zero(target: Target, loss_type: str) -> None:
    nothing = torch.empty(0, requires_grad=True, device=target.device)
    ids, scores = nothing.detach().long(), torch.full((4,), 0.1, device=target.device)
    loss, metrics = target.run(torch.float32)(nothing, ids, scores, settings=GRPOSettings(loss_type=loss_type))
    assert (loss.item(), torch.autograd.grad(loss, nothing)[0].numel(), metrics["tokens"].item()) == (0, 0, 0)


def test_a_sequence_without_rows_counts_in_the_mean(target: Target) -> None:
    run, logp = target.run(torch.float32), torch.tensor([-1.0, -1.0], device=target.device, requires_grad=True)
    ids, advantages = (torch.tensor(v, device=target.device) for v in ([0, 2], [1.0, 5.0, 2.0]))
    loss, _ = run(logp, ids, advantages)
    assert loss.item() == pytest.approx(-(1 + 0 + 2) / 3)
    loss, _ = run(logp, ids, advantages, settings=GRPOSettings(loss_type="gspo"))
    assert torch.autograd.grad(loss, logp)[0].tolist() == pytest.approx([-1 / 3, -2 / 3])
