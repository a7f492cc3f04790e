"""What holds of the gradients of every op: repeated backwards, strides, frozen weights, half precision, packs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_cases import HALVES, OBJECTIVES, Case, Target, eager_loss, head_of, options_of, targets
from vlmr1_kernels import GRPOSettings, group_advantages
from vlmr1_kernels.testing import (
    HEAD,
    Inputs,
    Problem,
    assert_within_budget,
    cast,
    eager_logprob,
    gradients,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("poison")

Call = Callable[[Any, Inputs, Any], Tensor]  # an implementation, inputs, a case -> a loss
# Two rows a chunk: sequences lie in several chunks, and chunks in several sequences.
SMALL = Case((3, 1, 4, 1), 20, 37, bias=True, softcap=8.0, chunk_mib=2 * 37 * 4 / 2**20)
BY_SEQUENCE = ("grpo", "gspo", "dr_grpo")  # loss types that take the mean over sequences
NAMES = ("grpo, k2, entropy", "gspo, k1", "cispo, k1, sequence level")
TOKEN, SEQUENCE, CISPO = (replace(SMALL, settings=OBJECTIVES[name]) for name in NAMES)


def by_logprob(run: Any, inputs: Inputs, case: Case) -> Tensor:
    options = {"temperature": case.settings.temperature, "softcap": case.softcap, "chunk_mib": case.chunk_mib}
    logp, entropy = run(**head_of(inputs), entropy=True, **options)
    return (logp * entropy).sum()


def by_linear_loss(run: Any, inputs: Inputs, case: Case) -> Tensor:
    return run(**inputs, **options_of(case))[0]


def by_loss(run: Any, inputs: Inputs, case: Case) -> Tensor:
    """The leaf is `hidden`: the log-probs are near the old ones."""
    logp = inputs["old_logp"].float() + 0.3 * inputs["hidden"][:, 0]
    given = {name: value for name, value in inputs.items() if name not in (*HEAD, "targets")}
    return run(logp, **given, settings=replace(case.settings, entropy_coef=0.0))[0]


def eager_by_logprob(inputs: Inputs, problem: Problem) -> Tensor:
    options = {"temperature": problem.settings.temperature, "softcap": problem.softcap}
    logp, entropy = eager_logprob(**head_of(inputs), **options)
    return (logp * entropy).sum()


CALLS: dict[str, Call] = {"linear_logprob": by_logprob, "grpo_loss": by_loss, "linear_grpo_loss": by_linear_loss}
LINEAR = {"linear_logprob": eager_by_logprob, "linear_grpo_loss": eager_loss}
of_linear_ops = pytest.mark.parametrize("target", [each for op in LINEAR for each in targets(op)])
of_all_ops = pytest.mark.parametrize("target", [each for op in CALLS for each in targets(op)])
of_losses = pytest.mark.parametrize("target", [*targets("grpo_loss"), *targets("linear_grpo_loss")])
of_both_levels = pytest.mark.parametrize("case", [TOKEN, SEQUENCE], ids=["token", "sequence"])


def trained(inputs: Inputs, target: Target) -> list[Tensor]:
    return [inputs[name] for name in (("hidden",) if target.op == "grpo_loss" else HEAD)]


@of_all_ops
@of_both_levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_backward_can_be_repeated_and_follows_the_factor(target: Target, case: Case, dtype: torch.dtype) -> None:
    run, inputs, call = target.run(dtype), cast(case.draw(0, dtype), dtype, target.device), CALLS[target.op]
    leaves, loss = trained(inputs, target), call(run, inputs, case)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [value.clone() for value in first]
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    fourfold = torch.autograd.grad(4 * loss, leaves)
    call(run, inputs, case).backward()
    for index, expected in enumerate(kept):
        assert torch.equal(first[index], expected), "a later call changed a gradient that was kept"
        assert torch.equal(second[index], expected)
        torch.testing.assert_close(fourfold[index], 4 * expected)


def moved(inputs: Inputs) -> Inputs:
    """Equal numbers: strided, not aligned, transposed, in another integer type."""
    given: Inputs = {}
    for name, value in inputs.items():
        if value.dim() == 1:
            value = value.int() if name in ("targets", "seq_ids") else value
            given[name] = torch.stack([value, value], dim=1).flatten()[1::2]
    given["hidden"] = inputs["hidden"].T.contiguous().T
    given["weight"] = torch.cat([inputs["weight"]] * 2, dim=1)[:, : inputs["weight"].shape[1]]
    return given


def results(target: Target, case: Case, change: Callable[[Inputs], Inputs], dtype: Any = torch.float32) -> list[Tensor]:
    """Loss and gradients, with what the op is given changed."""
    inputs = cast(case.draw(0, dtype), dtype, target.device)
    loss = CALLS[target.op](target.run(dtype), change(inputs), case)
    return [loss, *torch.autograd.grad(loss, trained(inputs, target))]


@of_all_ops
@of_both_levels
def test_layout_and_integer_type_of_the_inputs_do_not_matter(target: Target, case: Case) -> None:
    torch.testing.assert_close(results(target, case, moved), results(target, case, dict))


BY_LOSS_TYPE = {settings.loss_type: settings for settings in OBJECTIVES.values()}


@of_losses
@pytest.mark.parametrize("settings", BY_LOSS_TYPE.values(), ids=BY_LOSS_TYPE.keys())
def test_losses_of_packs_add_up(target: Target, settings: GRPOSettings) -> None:
    case, count = replace(SMALL, settings=settings), torch.tensor([4 if settings.loss_type in BY_SEQUENCE else 9])

    def part(inputs: Inputs, rows: slice, sequences: slice) -> Inputs:
        given = {name: value if name in ("weight", "bias") else value[rows] for name, value in inputs.items()}
        given |= {"advantages": inputs["advantages"][sequences], "seq_ids": given["seq_ids"] - sequences.start}
        return given | {"normalizer": count.to(target.device) if rows.start else count.item()}

    first = results(target, case, lambda inputs: part(inputs, slice(0, 4), slice(0, 2)))
    second = results(target, case, lambda inputs: part(inputs, slice(4, 9), slice(2, 4)))
    added = [one + other for one, other in zip(first, second, strict=True)]
    torch.testing.assert_close(added, results(target, case, dict))


@of_losses
def test_rewards_in_place_of_advantages(target: Target) -> None:
    rewards = torch.tensor([1.0, 0.25, 0.1, 0.1], device=target.device)  # the second group is equal
    apart = {"advantages": group_advantages(rewards, 2, impl=target.impl)}
    fused = {"advantages": None, "rewards": rewards, "num_generations": 2}
    found, expected = (results(target, TOKEN, lambda inputs, g=given: inputs | g) for given in (fused, apart))
    torch.testing.assert_close(found, expected)


@of_losses
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "gspo"])
@pytest.mark.parametrize("form", ["advantages", "rewards", "rewards, first group active"])
def test_equal_rewards_and_advantages_of_zero_give_zero(target: Target, loss_type: str, form: str) -> None:
    given: dict[str, Any] = {"advantages": torch.zeros(4, device=target.device)}
    if form != "advantages":
        equal = torch.full((4,), 0.1, device=target.device)
        given = {"advantages": None, "rewards": equal, "num_generations": 2}
    if "active" in form and target.op == "linear_grpo_loss":
        given |= {"active_rows": torch.arange(4, device=target.device), "check": True}
    case = replace(SMALL, settings=GRPOSettings(loss_type=loss_type))
    values = results(target, case, lambda inputs: inputs | given)
    assert [value.abs().max().item() for value in values] == [0.0] * len(values)


@of_linear_ops
@pytest.mark.parametrize("case", [TOKEN, SEQUENCE, CISPO], ids=["token", "sequence", "cispo, sequence"])
@pytest.mark.parametrize("leaves", [("hidden",), ("weight",), ("bias",), ("weight", "bias")], ids="+".join)
def test_only_what_is_trained_gets_a_gradient(target: Target, case: Case, leaves: tuple[str, ...]) -> None:
    run, call = target.run(torch.float32), CALLS[target.op]
    inputs = cast(case.draw(0, torch.float32), torch.float32, target.device)
    whole = call(run, inputs, case)
    expected = dict(zip(HEAD, gradients(whole, inputs), strict=True))
    for name in set(HEAD) - set(leaves):
        inputs[name].requires_grad_(False)
    loss = call(run, inputs, case)
    loss.backward()
    torch.testing.assert_close(loss, whole)
    for name in HEAD:
        torch.testing.assert_close(inputs[name].grad, expected[name] if name in leaves else None)


@pytest.mark.slow
@of_linear_ops
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_gradients_do_not_get_worse_with_the_number_of_chunks(target: Target, dtype) -> None:
    run, call, eager, case = target.run(dtype), CALLS[target.op], LINEAR[target.op], Case((24, 26), 16, 20)
    drawn = case.draw(0, dtype)
    for name in ("hidden", "advantages"):
        drawn[name] = drawn[name].abs()  # one sign: a sum in half precision would stop growing

    def plain(kind: torch.dtype, device: str) -> list[Tensor]:
        inputs = cast(drawn, kind, device)
        return [value.cpu() for value in gradients(eager(inputs, case), inputs)]

    def by_chunks(rows: int) -> list[Tensor]:
        inputs = cast(drawn, dtype, target.device)
        loss = call(run, inputs, replace(case, chunk_mib=rows * 20 * 4 / 2**20))
        return [value.cpu() for value in gradients(loss, inputs)]

    exact, one, many = plain(torch.float64, "cpu"), by_chunks(1000), by_chunks(3)
    assert_within_budget(("d_hidden", "d_weight"), many, plain(dtype, target.device), exact)
    assert relative_error(many[1], exact[1]) <= 1.1 * relative_error(one[1], exact[1])
