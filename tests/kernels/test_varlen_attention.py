from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.attention import NAMES, SEQUENCES, offsets, one_by_one, tensors, with_gradients
from tests.helpers.kernel_cases import Target, targets
from vlmr1_kernels import varlen_attention
from vlmr1_kernels.batched import varlen_attention as batched
from vlmr1_kernels.reference import varlen_attention as reference
from vlmr1_kernels.testing import assert_within_budget, pooled


@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 17)], ids=["equal heads", "grouped heads"])
@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize("impl", ["reference", "batched"])
def test_equals_one_by_one(impl: str, lengths: tuple[int, ...], heads: tuple[int, int, int]) -> None:
    inputs = tensors(sum(lengths), *heads)
    options: dict[str, Any] = {"cu_seqlens": offsets(lengths), "max_length": max(lengths), "scale": 0.3, "impl": impl}
    expected = with_gradients(one_by_one, inputs, torch.float64, lengths, 0.3)
    values = with_gradients(partial(varlen_attention, **options), inputs, torch.float64)
    for value, truth in zip(values, expected, strict=True):
        torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", [SEQUENCES["mixed"], SEQUENCES["longer than a block"]], ids=["mixed", "long"])
@pytest.mark.parametrize("target", targets("varlen_attention", only=("reference", "batched")))
def test_error_is_within_budget(target: Target, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    problems = [[value.to(dtype).double() for value in tensors(sum(lengths), 4, 2, 80)] for _ in range(4)]
    cu_seqlens = offsets(lengths).to(target.device)
    attention = partial(target.run(dtype), cu_seqlens=cu_seqlens, max_length=max(lengths))
    ours = [with_gradients(attention, inputs, dtype, device=target.device) for inputs in problems]
    assert {value.dtype for value in ours[0]} == {dtype}
    assert_within_budget(
        NAMES,
        pooled(ours),
        pooled(with_gradients(one_by_one, inputs, dtype, lengths, 80**-0.5) for inputs in problems),
        pooled(with_gradients(one_by_one, inputs, torch.float64, lengths, 80**-0.5) for inputs in problems),
    )


@pytest.mark.parametrize("function", [reference, batched], ids=["reference", "batched"])
def test_gradcheck(function: Any) -> None:
    lengths = (2, 1, 2)
    leaves = [value.contiguous().requires_grad_() for value in tensors(5, 2, 1, 3)[:3]]
    options: dict[str, Any] = {"cu_seqlens": offsets(lengths), "max_length": 2, "scale": 0.7}
    assert torch.autograd.gradcheck(partial(function.varlen_attention, **options), leaves)


def test_neighbours_of_one_length_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = batched.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append((q.shape, q.data_ptr()))
        return original(q, k, v, **options)

    monkeypatch.setattr(batched, "scaled_dot_product_attention", spy)
    q, k, v, _ = (value.float() for value in tensors(15, 2, 2, 8))
    out = varlen_attention(q, k, v, offsets((5, 5, 5)), 5, impl="batched")
    assert calls == [((3, 2, 5, 8), q.data_ptr())]
    assert out.transpose(1, 2).is_contiguous()
    varlen_attention(q, k, v, offsets((3, 5, 3, 4)), 5, impl="batched")
    assert [shape for shape, _ in calls[1:]] == [(1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 3, 8), (1, 2, 4, 8)]
