from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmr1_kernels import PrefixLayout, shared_prefix_attention
from vlmr1_kernels.cpu import shared_prefix_attention as cpu
from vlmr1_kernels.reference import shared_prefix_attention as reference
from vlmr1_kernels.testing import assert_within_budget, pooled


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[H, n, Dh] and [Hkv, n, Dh] -> [H, n, Dh]."""
    repeat, rows = q.shape[0] // k.shape[0], q.shape[1]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    scores = scale * (q @ k.mT)
    scores = scores + torch.full((rows, rows), -torch.inf, dtype=q.dtype).triu(1)
    return torch.softmax(scores, -1) @ v


def separately(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
    """Every branch in a sequence of its own, behind a copy of its prompt."""
    q, k, v = q[0], k[0], v[0]
    first, prompts, branches = 0, [], []
    start = sum(layout.prompt_lengths)
    for prompt, lengths in zip(layout.prompt_lengths, layout.branch_lengths, strict=True):
        head = torch.arange(first, first + prompt)
        prompts.append(causal(q[:, head], k[:, head], v[:, head], scale))
        for length in lengths:
            rows = torch.cat([head, torch.arange(start, start + length)])
            branches.append(causal(q[:, rows], k[:, rows], v[:, rows], scale)[:, prompt:])
            start += length
        first += prompt
    return torch.cat(prompts + branches, dim=1)[None]


def tensors(layout: PrefixLayout, heads: int, kv_heads: int, head_dim: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, float64, strided like a model's projections."""
    length = layout.total_length
    return [
        torch.randn(1, length, count, head_dim, dtype=torch.float64).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def with_gradients(
    attention: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, *rest: Any
) -> list[Tensor]:
    *leaves, d_out = (value.to(dtype).detach() for value in inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    out = attention(*leaves, *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


NAMES = ("out", "d_q", "d_k", "d_v")
CASES: dict[str, tuple[PrefixLayout, tuple[int, int, int]]] = {
    "equal branches": (PrefixLayout((5,), ((4, 4, 4),)), (4, 4, 16)),
    "ragged branches": (PrefixLayout((7,), ((3, 1, 6, 2),)), (4, 4, 16)),
    "empty branches": (PrefixLayout((3, 4), ((0, 2, 0), (0,))), (2, 2, 16)),
    "prefill": (PrefixLayout((3, 1, 6), ((), (), ())), (2, 1, 16)),
    "prompt of one row": (PrefixLayout((1, 1), ((1, 3), (2,))), (2, 2, 64)),
    "grouped heads": (PrefixLayout((9, 4), ((5, 2), (3, 3))), (8, 2, 80)),
    "one key head": (PrefixLayout((6,), ((5, 2),)), (6, 1, 128)),
    "odd head dimension": (PrefixLayout((6, 2), ((5, 2), (4,))), (3, 1, 17)),
    "many groups": (
        PrefixLayout(tuple(range(1, 21)), tuple((i % 4, 2, i % 3) for i in range(20))),
        (4, 2, 16),
    ),
    "longer than a block": (PrefixLayout((150, 70), ((90, 140), (33,))), (2, 1, 64)),
}


@pytest.mark.parametrize(("layout", "heads"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("function", [reference, cpu], ids=["reference", "cpu"])
def test_equals_separate_sequences(function: Any, layout: PrefixLayout, heads: tuple[int, int, int]) -> None:
    """The arithmetic, in float64, which the kernels below `cpu` serve too."""
    inputs = tensors(layout, *heads)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function.shared_prefix_attention(q, k, v, layout, scale=0.3)

    expected = with_gradients(separately, inputs, torch.float64, layout, 0.3)
    for value, truth in zip(with_gradients(attention, inputs, torch.float64), expected, strict=True):
        torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("layout", "heads"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_error_is_within_budget(
    impl: str, layout: PrefixLayout, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    problems = [[value.to(dtype).double() for value in tensors(layout, *heads)] for _ in range(4)]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return shared_prefix_attention(q, k, v, layout, impl=impl)

    scale = heads[2] ** -0.5
    ours = [with_gradients(attention, inputs, dtype) for inputs in problems]
    assert {value.dtype for value in ours[0]} == {dtype}
    assert_within_budget(
        NAMES,
        pooled(ours),
        pooled(with_gradients(separately, inputs, dtype, layout, scale) for inputs in problems),
        pooled(with_gradients(separately, inputs, torch.float64, layout, scale) for inputs in problems),
    )


@pytest.mark.parametrize("function", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize(
    "layout", [PrefixLayout((2, 1), ((2, 1), (1, 0))), PrefixLayout((2,), ((2, 2),))], ids=["ragged", "equal"]
)
def test_gradcheck(function: Any, layout: PrefixLayout) -> None:
    leaves = [value.contiguous().requires_grad_() for value in tensors(layout, 2, 1, 3)[:3]]
    assert torch.autograd.gradcheck(lambda *qkv: function.shared_prefix_attention(*qkv, layout, scale=0.7), leaves)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_strides_of_the_inputs_do_not_matter(impl: str) -> None:
    layout = PrefixLayout((4, 2), ((3, 2), (2, 2)))
    inputs = [value.float() for value in tensors(layout, 4, 2, 8)]
    reversed_strides = [value.mT.contiguous().mT for value in inputs]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return shared_prefix_attention(q, k, v, layout, impl=impl)

    for value, expected in zip(
        with_gradients(attention, reversed_strides, torch.float32),
        with_gradients(attention, inputs, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_groups_and_branches_do_not_see_each_other(impl: str) -> None:
    layout = PrefixLayout((3, 2), ((2, 2), (3,)))  # rows: 012 34 | 56 78 | 9 10 11
    q, k, v, _ = (value.float() for value in tensors(layout, 2, 2, 16))
    before = shared_prefix_attention(q, k, v, layout, impl=impl)
    k, v = k.clone(), v.clone()
    k[:, :, 6], v[:, :, 6] = torch.randn(2, 2, 16)  # the second row of the first branch
    after = shared_prefix_attention(q, k, v, layout, impl=impl)
    changed = (before != after).any(dim=-1).any(dim=1)[0]
    assert changed.nonzero()[:, 0].tolist() == [6]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)), r"q must be \[1, H, L, Dh\]"),
        (((1, 2, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8)), "q has 6 rows, the layout has 5"),
        (((1, 2, 5, 8), (1, 2, 4, 8), (1, 2, 5, 8)), r"k must be \[1, Hkv, 5, 8\]"),
        (((1, 2, 5, 8), (1, 2, 5, 8), (1, 1, 5, 8)), r"k is \[1, 2, 5, 8\], v is \[1, 1, 5, 8\]"),
        (((1, 3, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)), "3 query heads are no multiple of 2"),
    ],
    ids=["batch", "layout", "rows", "values", "heads"],
)
def test_bad_shapes_are_named(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    q, k, v = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(q, k, v, PrefixLayout((2,), ((3,),)))


def test_mixed_dtypes_are_named() -> None:
    q = torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"v is torch.bfloat16, q is torch.float32"):
        shared_prefix_attention(q, q, q.bfloat16(), PrefixLayout((2,), ((3,),)))
