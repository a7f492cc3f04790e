"""The cases of packed prefix attention, and its oracle: every branch in a sequence of its own."""

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from vlmr1_kernels import PrefixLayout
from vlmr1_kernels.testing import assert_within_budget, pooled


def attend(q, k, v, scale, *, causal=True, softcap=None, window=None) -> Tensor:
    """[H, n, Dh] and [Hkv, n, Dh] -> [H, n, Dh]."""
    repeat, rows = q.shape[0] // k.shape[0], q.shape[1]
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    scores = scale * (q @ k.mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = torch.full((rows, rows), -torch.inf, dtype=q.dtype)
    if causal:
        scores = scores + hidden.triu(1)
    if window is not None:
        scores = scores + hidden.tril(-window)
    return torch.softmax(scores, -1) @ v


def separately(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float, **options: Any) -> Tensor:
    """Every branch in a sequence of its own, behind a copy of its prompt."""
    q, k, v = q[0], k[0], v[0]
    first, prompts, branches = 0, [], []
    start = sum(layout.prompt_lengths)
    for prompt, lengths in zip(layout.prompt_lengths, layout.branch_lengths, strict=True):
        head = torch.arange(first, first + prompt)
        prompts.append(attend(q[:, head], k[:, head], v[:, head], scale, **options))
        for length in lengths:
            rows = torch.cat([head, torch.arange(start, start + length)])
            branches.append(attend(q[:, rows], k[:, rows], v[:, rows], scale, **options)[:, prompt:])
            start += length
        first += prompt
    return torch.cat(prompts + branches, dim=1)[None]


def tensors(length: int, heads: int, kv_heads: int, head_dim: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, float64, strided like a model's projections."""
    return [
        torch.randn(1, length, count, head_dim, dtype=torch.float64).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def with_gradients(attention, inputs: list[Tensor], dtype, *, device="cpu", **options: Any) -> list[Tensor]:
    """out, d_q, d_k, d_v."""
    *leaves, d_out = (value.to(device, dtype).detach() for value in inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    out = attention(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


NAMES = ("out", "d_q", "d_k", "d_v")
Heads = tuple[int, int, int]  # H, Hkv, Dh
CASES: dict[str, tuple[PrefixLayout, Heads]] = {
    "equal branches": (PrefixLayout((5,), ((4, 4, 4),)), (4, 4, 16)),
    "ragged branches": (PrefixLayout((7,), ((3, 1, 6, 2),)), (4, 4, 16)),
    "empty branches": (PrefixLayout((3, 4), ((0, 2, 0), (0,))), (2, 2, 16)),
    "groups without branches": (PrefixLayout((3, 5, 2, 4), ((2, 1), (), (0, 0), (3,))), (4, 2, 16)),
    "prefill": (PrefixLayout((3, 1, 6), ((), (), ())), (2, 1, 16)),
    "prompt of one row": (PrefixLayout((1, 1), ((1, 3), (2,))), (2, 2, 64)),
    "grouped heads": (PrefixLayout((9, 4), ((5, 2), (3, 3))), (8, 2, 80)),
    "one key head": (PrefixLayout((6,), ((5, 2),)), (6, 1, 128)),
    "odd head dimension": (PrefixLayout((6, 2), ((5, 2), (4,))), (3, 1, 17)),
    "many groups": (PrefixLayout(tuple(range(1, 21)), tuple((i % 4, 2, i % 3) for i in range(20))), (4, 2, 16)),
    "longer than a block": (PrefixLayout((150, 70), ((90, 140), (33,))), (2, 1, 64)),
    "very different lengths": (PrefixLayout((200, 1), ((1, 1), (130, 2))), (6, 2, 16)),
}
# One or two keys a row. Their gradient is the small difference of numbers that flash kernels rebuild from their
# rounded output: in float32 about 2.3 times the error of plain torch, so the budget does not hold here.
FEW_KEYS = {"one row everywhere": (PrefixLayout((1, 1), ((1,), (1,))), (4, 2, 16))}

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


def assert_equals(ours, oracle, inputs: list[Tensor], dtype=torch.float64, device="cpu", **near: float) -> None:
    """Output and gradients are those of the oracle in float64."""
    found = [value.cpu() for value in with_gradients(ours, inputs, dtype, device=device)]
    expected = with_gradients(oracle, inputs, torch.float64)
    torch.testing.assert_close(found, expected, check_dtype=False, **near)


def check_budget(ours, oracle, sizes: tuple[int, ...], dtype: torch.dtype, device="cpu") -> None:
    """Output and gradients err against the oracle in float64 at most twice as much as the oracle in `dtype`."""
    problems = [[value.to(dtype).double() for value in tensors(*sizes)] for _ in range(4)]
    values = [with_gradients(ours, inputs, dtype, device=device) for inputs in problems]
    assert {value.dtype for value in values[0]} == {dtype}
    plain, exact = (pooled(with_gradients(oracle, each, kind) for each in problems) for kind in (dtype, torch.float64))
    assert_within_budget(NAMES, pooled(values), plain, exact)
