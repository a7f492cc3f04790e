"""Allocations of the CUDA implementations of the ops, for dry runs on a machine without a GPU.

They make the tensors of `vlmr1_kernels.flash` and `vlmr1_kernels.triton`, in the same order, and compute nothing.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from vlmr1.rollout import sampling
from vlmr1.rollout.sampling import SamplingSettings
from vlmr1_kernels.linear import chunk_rows

# "flash" in the name: towers then pass all rows and their offsets in one call.
NAME = "vlmr1_plan_as_flash"
SAMPLING_BLOCK = 2048  # tokens of a block of `vlmr1_kernels.triton.sample_tokens`


class _Flash(torch.autograd.Function):
    """q [b, H, L, Dh] -> out of the same shape; saves q, k, v, out and the log-sum-exps for backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: int) -> Tensor:
        batch, heads, length, head_dim = q.shape
        out = q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
        lse = q.new_empty(batch, heads, length, dtype=torch.float32)
        more = [torch.empty_like(out) for _ in range(calls - 1)]  # merged into the first
        del more
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls = calls
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, lse = ctx.saved_tensors
        made = None
        for _ in range(ctx.calls):
            sums = torch.empty_like(q, dtype=torch.float32), torch.empty_like(lse)  # of d_q, and of d_out * out
            by_query_head = 2 if q.shape[1] != k.shape[1] else 0
            heads = [torch.empty_like(q) for _ in range(by_query_head)]  # d_k, d_v
            again = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            made = made or again
            del sums, heads, again
        assert made is not None
        return *made, None


class FlashPacked:
    """The packed attention of a decoder: a call over all rows, and one of the branches over their prompts."""

    def __init__(self, branches: bool):
        self.calls = 2 if branches else 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return _Flash.apply(q, k, v, self.calls)  # type: ignore[return-value]


class Streaming:
    """The attention of a decode step, which copies no keys and values."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return torch.empty_like(q)


def sample_tokens(
    logits: Tensor, suppressed_ids: Tensor, settings: SamplingSettings, draws: Tensor, seen: Tensor | None
) -> None:
    """Allocate what `sample_tokens` does; the reference's tensors with top_k or top_p."""
    if 0 < settings.top_k < logits.shape[1] or settings.top_p < 1:
        sampling.sample_tokens(logits, suppressed_ids, settings, draws, seen)
    else:
        rows, vocabulary = logits.shape
        held = [logits.new_empty(rows, dtype=each) for each in (torch.int64, torch.float32, torch.float32)]
        held.append(logits.new_empty(4, rows, -(-vocabulary // SAMPLING_BLOCK), dtype=torch.float32))


def _tower(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _Flash.apply(query, key, value, 1).transpose(1, 2), None  # type: ignore[union-attr]


AttentionInterface.register(NAME, _tower)


class _Head(torch.autograd.Function):
    """hidden [N, D], weight [V, D] -> loss []; allocates a chunk's logits, a block's gradient of them, and both
    gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: int, block: int) -> Tensor:
        dtype, trained = hidden.dtype, ctx.needs_input_grad[1]
        operand = weight.to(dtype)
        logits = hidden.new_empty(rows, len(weight), dtype=torch.float32)
        d_logits = logits if dtype == torch.float32 else hidden.new_empty(block, len(weight), dtype=dtype)
        d_hidden, d_weight = torch.empty_like(hidden), None
        at_once = weight.dtype == torch.bfloat16 and len(hidden) <= block  # without float32 sums
        if trained and not at_once:
            d_weight = torch.empty_like(weight, dtype=torch.float32)
        del logits
        hidden.new_empty(len(d_logits), hidden.shape[1], dtype=torch.float32)  # d_hidden before it is rounded
        if trained and at_once:
            d_weight = torch.empty_like(weight)
        del d_logits, operand
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.saved_tensors, None, None


def head_loss(hidden: Tensor, weight: Tensor) -> Tensor:
    """Allocate what `linear_grpo_loss` does."""
    chunk, block = chunks_of(hidden, weight)
    return _Head.apply(hidden, weight, chunk, block)  # type: ignore[return-value]


def head_logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
    """Allocate what `linear_logprob` does without gradient: [N]."""
    hidden.new_empty(chunks_of(hidden, weight)[0], len(weight), dtype=torch.float32)
    return hidden.new_empty(len(hidden), dtype=torch.float32)


def chunks_of(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    """Numbers of rows that are projected and that are consumed at once on a GPU."""
    needs: Any = {"device": torch.device("cuda"), "requires_grad": weight.requires_grad}
    rows, columns = (SimpleNamespace(shape=each.shape, dtype=each.dtype, **needs) for each in (hidden, weight))
    chunk, block = chunk_rows(rows, columns, None)  # type: ignore[reportArgumentType]
    return min(len(hidden), chunk), min(len(hidden), block)
