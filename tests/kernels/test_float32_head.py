"""Trained float32 weights of a half-precision head: float32 gradients, and their accumulation into `.grad`."""

from typing import Any

import pytest
import torch

from tests.helpers.kernel_cases import HALVES, OBJECTIVES, Case, Target, eager_loss, head_of, options_of, targets
from vlmr1_kernels import linear_grpo_loss
from vlmr1_kernels.testing import Inputs, cast, eager_logprob, gradients, relative_error

OP = "linear_grpo_loss"
# Two rows a chunk, or all.
CHUNKED = Case((3, 1, 4, 1), 24, 37, OBJECTIVES["grpo, k2, entropy"], bias=True, chunk_mib=2 * 37 * 4 / 2**20)
SEQUENCE = Case((3, 1, 4, 1), 24, 37, OBJECTIVES["gspo, k1"])
of_cases = pytest.mark.parametrize("case", [CHUNKED, SEQUENCE], ids=["chunks", "one chunk, sequence level"])


def with_master(case: Case, dtype: torch.dtype, device: str) -> Inputs:
    """Inputs in `dtype` whose weight is float32, between numbers of `dtype`."""
    inputs = cast(case.draw(0, dtype), dtype, device)
    between = 1 + torch.finfo(dtype).eps / 3
    return inputs | {"weight": (inputs["weight"].detach().float() * between).requires_grad_()}


def loss_of(target: Target, inputs: Inputs, case: Case, dtype: torch.dtype) -> torch.Tensor:
    if target.op == "linear_grpo_loss":
        return target.run(dtype)(**inputs, **options_of(case))[0]
    logp, entropy = target.run(dtype)(**head_of(inputs), entropy=True, chunk_mib=case.chunk_mib)
    return (logp * entropy).sum()


@pytest.mark.parametrize("target", [*targets(OP), *targets("linear_logprob")], ids=lambda target: target.op)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@of_cases
def test_gradient_does_not_pass_through_half_precision(target: Target, case: Case, dtype: torch.dtype) -> None:
    inputs = with_master(case, dtype, target.device)
    loss = loss_of(target, inputs, case, dtype)
    d_weight = gradients(loss, inputs)[1]

    narrow = inputs | {"weight": inputs["weight"].detach().to(dtype).requires_grad_()}
    assert torch.equal(loss, loss_of(target, narrow, case, dtype)), "the weight is read in the dtype of hidden"
    exact_inputs = cast({name: value.detach().double() if value.is_floating_point() else value
                         for name, value in narrow.items()}, torch.float64)  # fmt: skip
    if target.op == "linear_grpo_loss":
        exact_loss = eager_loss(exact_inputs, case)
    else:
        logp, entropy = eager_logprob(**head_of(exact_inputs))
        exact_loss = (logp * entropy).sum()
    exact = gradients(exact_loss, exact_inputs)[1]

    assert d_weight.dtype == torch.float32
    error = relative_error(d_weight.cpu(), exact)
    assert error < relative_error(gradients(loss_of(target, narrow, case, dtype), narrow)[1].cpu(), exact)
    # Native rounds the gradient of bfloat16 logits, and CUDA that of all half-precision logits.
    rounds = target.device != "cpu" or (target.impl == "native" and dtype == torch.bfloat16)
    assert error < (torch.finfo(dtype).eps if rounds else 3e-6)


@of_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulated_gradient(target: Target, case: Case, dtype: torch.dtype) -> None:
    run, inputs = target.run(dtype), with_master(case, dtype, target.device)
    weight = inputs["weight"]
    loss, _ = run(**inputs, **options_of(case))
    d_hidden, d_weight, *_ = gradients(loss, inputs)

    loss, _ = run(**inputs, **options_of(case), accumulate_grad=True)
    loss.backward(retain_graph=True)
    assert torch.equal(weight.grad, d_weight) and torch.equal(inputs["hidden"].grad, d_hidden)
    (3 * loss).backward()
    torch.testing.assert_close(weight.grad, 4 * d_weight)
    kept = weight.grad
    run(**inputs, **options_of(case), accumulate_grad=True)[0].backward()
    assert weight.grad is kept
    torch.testing.assert_close(kept, 5 * d_weight)

    weight.requires_grad_(False)
    run(**inputs, **options_of(case), accumulate_grad=True)[0].backward()
    torch.testing.assert_close(kept, 5 * d_weight)


def test_only_leaves_accumulate() -> None:
    inputs: dict[str, Any] = with_master(SEQUENCE, torch.float32, "cpu")
    inputs["weight"] = 2 * inputs["weight"]
    with pytest.raises(ValueError, match=r"accumulate_grad.*weight"):
        linear_grpo_loss(**inputs, accumulate_grad=True)
