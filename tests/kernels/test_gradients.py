"""What holds of the gradients of every op: repeated backwards, strides, frozen and tied weights, half precision."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_cases import (
    HALVES,
    OBJECTIVES,
    PER_ROW,
    Case,
    Target,
    check_budget,
    eager_loss,
    head_of,
    targets,
)
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
TOKEN, SEQUENCE = (replace(SMALL, settings=OBJECTIVES[name]) for name in ("grpo, k2, entropy", "gspo, k1"))


def by_logprob(run: Any, inputs: Inputs, case: Case) -> Tensor:
    options = {"temperature": case.settings.temperature, "softcap": case.softcap, "chunk_mib": case.chunk_mib}
    logp, entropy = run(**head_of(inputs), entropy=True, **options)
    return (logp * entropy).sum()


def by_linear_loss(run: Any, inputs: Inputs, case: Case) -> Tensor:
    return run(**inputs, settings=case.settings, softcap=case.softcap, chunk_mib=case.chunk_mib)[0]


def by_loss(run: Any, inputs: Inputs, case: Case) -> Tensor:
    """The leaf is `hidden`: the log-probs are near the old ones."""
    logp = inputs["old_logp"].float() + 0.3 * inputs["hidden"][:, 0]
    given = {name: inputs[name] for name in ("seq_ids", "advantages", *PER_ROW)}
    return run(logp, **given, settings=replace(case.settings, entropy_coef=0.0))[0]


def eager_by_logprob(inputs: Inputs, problem: Problem) -> Tensor:
    options = {"temperature": problem.settings.temperature, "softcap": problem.softcap}
    logp, entropy = eager_logprob(**head_of(inputs), **options)
    return (logp * entropy).sum()


CALLS: dict[str, Call] = {"linear_logprob": by_logprob, "grpo_loss": by_loss, "linear_grpo_loss": by_linear_loss}
LINEAR = {"linear_logprob": eager_by_logprob, "linear_grpo_loss": eager_loss}
of_linear_ops = pytest.mark.parametrize("target", [each for op in LINEAR for each in targets(op)])
of_all_ops = pytest.mark.parametrize("target", [each for op in CALLS for each in targets(op)])
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


@of_all_ops
@of_both_levels
def test_layout_and_integer_type_of_the_inputs_do_not_matter(target: Target, case: Case) -> None:
    run, call, drawn = target.run(torch.float32), CALLS[target.op], case.draw(0, torch.float32)

    def results(change: Callable[[Inputs], Inputs]) -> list[Tensor]:
        inputs = cast(drawn, torch.float32, target.device)
        loss = call(run, change(inputs), case)
        return [loss, *torch.autograd.grad(loss, trained(inputs, target))]

    for value, expected in zip(results(moved), results(dict), strict=True):
        torch.testing.assert_close(value, expected)


@of_linear_ops
@of_both_levels
@pytest.mark.parametrize("leaves", [("hidden",), ("weight",), ("bias",), ("weight", "bias")], ids="+".join)
def test_only_what_is_trained_gets_a_gradient(target: Target, case: Case, leaves: tuple[str, ...]) -> None:
    run, call = target.run(torch.float32), CALLS[target.op]
    inputs = cast(case.draw(0, torch.float32), torch.float32, target.device)
    expected = dict(zip(HEAD, gradients(call(run, inputs, case), inputs), strict=True))
    for name in set(HEAD) - set(leaves):
        inputs[name].requires_grad_(False)
    call(run, inputs, case).backward()
    for name in HEAD:
        if name in leaves:
            torch.testing.assert_close(inputs[name].grad, expected[name])
        else:
            assert inputs[name].grad is None


@pytest.mark.slow
@of_linear_ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradients_of_a_tied_weight_add_up(target: Target, dtype: torch.dtype) -> None:
    run, call, eager = target.run(dtype), CALLS[target.op], LINEAR[target.op]

    def tied(loss: Callable[[Inputs], Tensor]) -> Callable[[Inputs, Problem], list[Tensor]]:
        def gradient(inputs: Inputs, problem: Problem) -> list[Tensor]:
            embedding = inputs["weight"]
            given = inputs | {"hidden": torch.tanh(embedding[inputs["targets"].flip(0)])}
            return list(torch.autograd.grad(loss(given), embedding))

        return gradient

    case = Case((9, 11), 24, 50, OBJECTIVES["grpo, k2, entropy"])
    ours, plain = tied(lambda inputs: call(run, inputs, case)), tied(lambda inputs: eager(inputs, case))
    check_budget(("d_weight",), ours, plain, target, case, dtype)


@pytest.mark.slow
@of_linear_ops
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_gradients_do_not_get_worse_with_the_number_of_chunks(
    target: Target, dtype: torch.dtype
) -> None:
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
