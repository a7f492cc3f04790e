from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.attention import SEQUENCES, assert_equals, check_budget, offsets, one_by_one, tensors
from tests.helpers.kernel_cases import Target
from vlmr1_kernels.batched import varlen_attention as batched
from vlmr1_kernels.cpu import varlen_attention as cpu
from vlmr1_kernels.reference import varlen_attention as reference

OP = "varlen_attention"
FUNCTIONS, NAMES = (reference, batched, cpu), ("reference", "batched", "cpu")


@pytest.mark.parametrize("heads", [(4, 4, 16), (6, 2, 17)], ids=["equal heads", "grouped heads"])
@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_equals_one_by_one(function: Any, lengths: tuple[int, ...], heads: tuple[int, int, int]) -> None:
    options: dict[str, Any] = {"cu_seqlens": offsets(lengths), "max_length": max(lengths), "scale": 0.3}
    oracle = partial(one_by_one, lengths=lengths, scale=0.3)
    assert_equals(partial(function.varlen_attention, **options), oracle, tensors(sum(lengths), *heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_error_is_within_budget(target: Target, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    cu_seqlens = offsets(lengths).to(target.device)
    ours = partial(target.run(dtype), cu_seqlens=cu_seqlens, max_length=max(lengths))
    oracle = partial(one_by_one, lengths=lengths, scale=80**-0.5)
    check_budget(ours, oracle, (sum(lengths), 4, 2, 80), dtype, target.device)


@pytest.mark.parametrize("function", FUNCTIONS, ids=NAMES)
def test_gradcheck(function: Any) -> None:
    lengths = (2, 1, 2)
    leaves = [value.contiguous().requires_grad_() for value in tensors(5, 2, 1, 3)[:3]]
    options: dict[str, Any] = {"cu_seqlens": offsets(lengths), "max_length": 2, "scale": 0.7}
    assert torch.autograd.gradcheck(partial(function.varlen_attention, **options), leaves)


@pytest.mark.parametrize(
    ("module", "name"), [(batched, "scaled_dot_product_attention"), (cpu, "_flash")], ids=["batched", "cpu"]
)
def test_neighbours_of_one_length_are_one_call(module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = getattr(module, name)

    def spy(q: Tensor, *others: Any, **options: Any) -> Any:
        calls.append((q.shape, q.data_ptr()))
        return original(q, *others, **options)

    monkeypatch.setattr(module, name, spy)
    q, k, v, _ = (value.float() for value in tensors(15, 2, 2, 8))
    out = module.varlen_attention(q, k, v, offsets((5, 5, 5)), 5, scale=0.3)
    assert calls == [((3, 2, 5, 8), q.data_ptr())]
    assert out.transpose(1, 2).is_contiguous()
    module.varlen_attention(q, k, v, offsets((3, 5, 3, 4)), 5, scale=0.3)
    assert [shape for shape, _ in calls[1:]] == [(1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 3, 8), (1, 2, 4, 8)]
