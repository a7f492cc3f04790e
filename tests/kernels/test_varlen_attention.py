import re
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.attention import NAMES, attend, tensors, with_gradients
from tests.kernels.conftest import Target, targets
from vlmr1_kernels import ImplementationError, varlen_attention
from vlmr1_kernels.batched import varlen_attention as batched
from vlmr1_kernels.reference import varlen_attention as reference
from vlmr1_kernels.testing import assert_within_budget, pooled

SEQUENCES: dict[str, tuple[int, ...]] = {
    "one": (7,),
    "equal": (4, 4, 4),
    "one row": (1, 1, 5, 1),
    "empty sequences": (0, 3, 0, 5, 0),
    "mixed": (16, 16, 9, 16, 3, 9, 16),
    "runs": (8, 8, 3, 3, 3, 1),
    "longer than a block": (150, 64, 33, 64),
}


def offsets(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    spans = [slice(*span) for span in pairwise([0, *accumulate(lengths)])]
    return torch.cat([attend(q[0, :, s], k[0, :, s], v[0, :, s], scale, causal=False) for s in spans], dim=1)[None]


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


@pytest.mark.parametrize(
    ("cu_seqlens", "max_length", "message"),
    [
        ([1, 5], 5, "must rise from 0 to 5, it is [1, 5]"),
        ([0, 4], 5, "must rise from 0 to 5"),
        ([0, 3, 2, 5], 5, "must rise from 0 to 5"),
        ([0, 4, 5], 3, "a sequence of 4 rows, max_length is 3"),
        ([0], 5, "must be int32 [S + 1]"),
        ([0, 5], 0, "max_length must be at least 1"),
    ],
    ids=["start", "end", "falls", "longer than said", "no sequence", "max_length"],
)
def test_bad_sequences_are_named(cu_seqlens: list[int], max_length: int, message: str) -> None:
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=re.escape(message)):
        varlen_attention(q, q, q, torch.tensor(cu_seqlens, dtype=torch.int32), max_length)


def test_bad_tensors_are_named() -> None:
    q, cu_seqlens = torch.zeros(1, 2, 5, 8), torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32 \[S \+ 1\], it is torch.int64 \[2\]"):
        varlen_attention(q, q, q, cu_seqlens.long(), 5)
    with pytest.raises(ValueError, match="cu_seqlens is on meta, q is on cpu"):
        varlen_attention(q, q, q, cu_seqlens.to("meta"), 5)
    with pytest.raises(ValueError, match=r"v must be \[1, Hkv, 5, 8\]"):
        varlen_attention(q, q, q[..., :4], cu_seqlens, 5)
    with pytest.raises(
        ImplementationError, match="'flash' does not support this call: runs on cuda, the tensors are on cpu"
    ):
        varlen_attention(q, q, q, cu_seqlens, 5, impl="flash")
