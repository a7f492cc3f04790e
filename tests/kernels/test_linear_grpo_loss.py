from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_cases import (
    OBJECTIVES,
    TINY_CHUNK,
    Case,
    Target,
    check_budget,
    eager_loss,
    eager_loss_and_gradients,
    grid,
    loss_and_gradients,
    options_of,
    targets,
)
from vlmr1_kernels import GRPOSettings, grpo_loss, linear_grpo_loss, linear_logprob
from vlmr1_kernels.testing import HEAD, Inputs, Problem, cast, gradients, relative_error

OP = "linear_grpo_loss"
pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TYPICAL = GRPOSettings(beta=0.1, entropy_coef=0.01, temperature=0.9)
NAMES = ("loss", "d_hidden", "d_weight", "d_bias")

CASES: dict[str, Case] = {
    "one token": Case((1,), 64, 32, TYPICAL, dtypes=DTYPES, draws=6),
    "7 rows, odd width": Case((3, 4), 200, 1000, TYPICAL, dtypes=DTYPES),
    "128 rows": Case((61, 1, 66), 65, 8193, TYPICAL, draws=2),
    "1000 rows": Case((400, 1, 350, 249), 64, 1000, GRPOSettings(loss_type="dapo"), draws=2),
    "2048 wide": Case((3, 4), 2048, 1000, TYPICAL),
    "wide head": Case((2, 1), 16, 151_936, TYPICAL),
    "bias, row by row": Case((2, 3), 33, 129, TYPICAL, bias=True, chunk_mib=TINY_CHUNK),
    "cold": Case((4, 5), 40, 77, replace(TYPICAL, temperature=0.3), bias=True),
    "hot": Case((4, 5), 40, 77, replace(TYPICAL, temperature=1.7)),
    "logits to 80": Case((14, 18), 64, 300, TYPICAL, spread=20.0, dtypes=DTYPES),
    "softcap": Case((7, 9), 64, 300, TYPICAL, spread=20.0, bias=True, softcap=30.0, dtypes=DTYPES),
    "gspo, several chunks": Case((7, 1, 8), 64, 300, GRPOSettings(loss_type="gspo"), chunk_mib=0.01, dtypes=DTYPES),
}
# Two rows a chunk: sequences lie in several chunks, and chunks in several sequences.
SMALL = Case((3, 1, 4, 1), 20, 37, TYPICAL, bias=True, softcap=8.0, chunk_mib=2 * 37 * 4 / 2**20)
BY_OBJECTIVE = {
    name: replace(SMALL, lengths=(3, 1, 2), settings=settings, dtypes=(torch.float32,), draws=9)
    for name, settings in OBJECTIVES.items()
}


@pytest.mark.parametrize("chunk_mib", [None, TINY_CHUNK], ids=["one chunk", "row by row"])
@pytest.mark.parametrize("case", BY_OBJECTIVE.values(), ids=BY_OBJECTIVE.keys())
def test_reference_equals_the_padded_formula(case: Case, chunk_mib: float | None) -> None:
    inputs = cast(case.draw(0, torch.float64), torch.float64)
    found = loss_and_gradients(partial(linear_grpo_loss, impl="reference"), inputs, replace(case, chunk_mib=chunk_mib))
    torch.testing.assert_close(found, eager_loss_and_gradients(inputs, case))


@pytest.mark.parametrize(("target", "case", "dtype"), grid(OP, CASES) + grid(OP, BY_OBJECTIVE))
def test_error_is_within_budget(target: Target, case: Case, dtype: torch.dtype) -> None:
    check_budget(NAMES, partial(loss_and_gradients, target.run(dtype)), eager_loss_and_gradients, target, case, dtype)


def eager_on_policy(inputs: Inputs, case: Case) -> list[Tensor]:
    return eager_loss_and_gradients({name: value for name, value in inputs.items() if name != "old_logp"}, case)


@pytest.mark.parametrize("name", ["grpo", "grpo, two-sided clip", "cispo, k2, entropy", "gspo, k3, everything"])
def test_error_is_within_budget_on_policy(target: Target, name: str) -> None:
    run = target.run(torch.float32)

    def ours(inputs: Inputs, case: Case) -> list[Tensor]:
        return loss_and_gradients(run, inputs | {"old_logp": None}, case)

    check_budget(NAMES, ours, eager_on_policy, target, BY_OBJECTIVE[name], torch.float32)


@pytest.mark.parametrize("target", targets(OP, slow=True))
@pytest.mark.parametrize("name", ["grpo, k3, rollout correction", "gspo, k1"])
def test_more_rows_than_a_grid_dimension_holds(target: Target, name: str) -> None:
    case = Case((1, 40_000, 17, 30_001), 3, 5, OBJECTIVES[name])
    check_budget(
        NAMES,
        partial(loss_and_gradients, target.run(torch.float32)),
        eager_loss_and_gradients,
        target,
        case,
        torch.float32,
    )


@pytest.mark.parametrize("with_gradient", [True, False], ids=["training", "no grad"])
@pytest.mark.parametrize("name", ["grpo, k2, entropy", "cispo, k3, rollout correction", "gspo, k1"])
def test_metrics_are_those_of_grpo_loss(target: Target, name: str, with_gradient: bool) -> None:
    case = BY_OBJECTIVE[name]
    run, drawn = target.run(torch.float32), case.draw(6, torch.float32)
    exact = cast(drawn, torch.float64)
    head = {leaf: exact.pop(leaf) for leaf in (*HEAD, "targets")}
    temperature = case.settings.temperature
    logp, entropy = linear_logprob(
        **head, temperature=temperature, softcap=case.softcap, entropy=True, impl="reference"
    )
    without_bonus = replace(case.settings, entropy_coef=0.0)
    _, expected = grpo_loss(logp, **exact, settings=without_bonus, impl="reference")
    expected["entropy"] = entropy.mean()
    with torch.set_grad_enabled(with_gradient):
        loss, metrics = run(**cast(drawn, torch.float32, target.device), **options_of(case))
    assert loss.requires_grad is with_gradient
    assert metrics.keys() == expected.keys()
    assert 0 < expected["clip_low"] + expected["clip_high"] < 1
    assert not any(value.requires_grad for value in metrics.values())
    near = {"check_dtype": False, "check_device": False, "rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(metrics, expected, **near)


@pytest.mark.parametrize("form", ["bool", "indices"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo"])
def test_active_rows_are_exact_and_the_others_are_never_read(target: Target, loss_type: str, form: str) -> None:
    run, case = target.run(torch.float32), replace(SMALL, settings=GRPOSettings(loss_type=loss_type))
    inputs = cast(case.draw(0, torch.float32), torch.float32, target.device)
    inputs["advantages"] = torch.tensor([0.7, 0.0, 0.0, -1.1], device=target.device)
    active = inputs["advantages"][inputs["seq_ids"]] != 0
    rows = active if form == "bool" else active.nonzero()[:, 0]
    expected = loss_and_gradients(run, inputs, case)
    for name in ("hidden", "old_logp", "ref_logp", "sampling_logp"):
        inputs[name].data[~active] = torch.nan
    loss, metrics = run(**inputs, **options_of(case), active_rows=rows, check=True)
    values = [loss, *gradients(loss, inputs)]
    torch.testing.assert_close(values, expected)
    assert values[1][~active].abs().max() == 0
    assert (metrics["tokens"].item(), metrics["dropped_rows"].item()) == (9, 5)
    assert torch.equal(metrics["logp"].isnan(), ~active)


@pytest.mark.parametrize("target", targets(OP, only=("native", "triton")))
@pytest.mark.parametrize("name", ["hidden", "old_logp", "ref_logp", "sampling_logp", "advantages"])
def test_nan_is_not_lost_in_a_clip(target: Target, name: str) -> None:
    case = Case((3, 2), 8, 40, GRPOSettings(beta=0.2, tis_cap=1.1, delta=1.5))
    inputs = cast(case.draw(0, torch.float32), torch.float32, target.device)
    inputs[name].data.view(-1)[0] = torch.nan
    loss, d_hidden, _ = loss_and_gradients(target.run(torch.float32), inputs, case)
    assert loss.isnan()
    assert d_hidden.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("count", [0, 3], ids=["no rows", "no active rows"])
@pytest.mark.parametrize("settings", [GRPOSettings(), GRPOSettings(loss_type="gspo")], ids=["grpo", "gspo"])
def test_nothing_to_do_gives_zeros(target: Target, count: int, settings: GRPOSettings, dtype: torch.dtype) -> None:
    case = Case((count, 0), 12, 23, settings)
    inputs = cast(case.draw(0, dtype), dtype, target.device)
    inputs["advantages"] = torch.zeros(2, device=target.device)
    active = torch.zeros(count, dtype=torch.bool, device=target.device) if count else None
    loss, metrics = target.run(dtype)(**inputs, settings=settings, active_rows=active, check=True)
    d_hidden, d_weight = gradients(loss, inputs)
    assert (loss.item(), d_hidden.abs().sum().item(), d_weight.abs().sum().item()) == (0, 0, 0)
    assert (d_hidden.shape, metrics["tokens"].item()) == ((count, 12), count)


@pytest.mark.parametrize("target", targets(OP, slow=True))
def test_float16_gradients_survive_many_rows_and_a_loss_scale(target: Target) -> None:
    run, case = target.run(torch.float16), Case((2000, 2096), 8, 16)
    drawn = case.draw(0, torch.float16)
    exact = gradients(eager_loss(each := cast(drawn, torch.float64), case), each)
    inputs = cast(drawn, torch.float16, target.device)
    # A mean over 4,096 rows is near the least number of float16: only a scaled gradient can be held.
    scaled = gradients(2.0**10 * run(**inputs)[0], inputs)
    for value, truth in zip(scaled, exact, strict=True):
        assert relative_error(value.cpu().double() / 2**10, truth) < 2e-3


@pytest.mark.parametrize("name", ["grpo", "gspo, k3, everything", "cispo, k2, entropy"])
def test_gradcheck(name: str) -> None:
    problem = Problem((2, 1, 3), 3, 5, OBJECTIVES[name], bias=True)
    inputs: dict[str, Any] = cast(problem.draw(0, torch.float64), torch.float64)
    leaves = [inputs.pop(leaf) for leaf in HEAD]
    if name.startswith("cispo"):  # its loss is not what its gradient descends: the ratio is held constant
        inputs["old_logp"] = None

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = {"hidden": hidden, "weight": weight, "bias": bias}
        return linear_grpo_loss(**head, **inputs, settings=problem.settings, chunk_mib=TINY_CHUNK)[0]

    assert torch.autograd.gradcheck(function, leaves)
