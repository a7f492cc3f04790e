"""Allocations of the CUDA implementations of the ops, for dry runs on a machine without a GPU.

They make the tensors of `vlmr1_kernels.flash` and `vlmr1_kernels.triton`, in the same order, and compute nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from vlmr1.planner.dry_run import kernel
from vlmr1.rollout import sampling
from vlmr1.rollout.sampling import SamplingSettings
from vlmr1_kernels import PrefixLayout
from vlmr1_kernels.linear import chunk_rows

# "flash" in the name: towers then pass all rows and their offsets in one call.
NAME = "vlmr1_plan_as_flash"
SAMPLING_BLOCK = 2048  # tokens of a block of `vlmr1_kernels.triton.sample_tokens`
# Names of kernels.
ATTENTION, ATTENTION_BACKWARD, DECODE = "attention", "attention_backward", "decode_attention"
MERGE = "attention_merge"


class _Flash(torch.autograd.Function):
    """q [b, H, L, Dh] -> out of the same shape; saves q, k, v, out and the log-sum-exps for backward. `pairs`: of rows
    and keys, by call."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pairs: Sequence[int]) -> Tensor:
        calls = len(pairs)
        batch, heads, length, head_dim = q.shape
        out = q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
        lse = q.new_empty(batch, heads, length, dtype=torch.float32)
        more = [torch.empty_like(out) for _ in range(calls - 1)]  # merged into the first
        del more
        for each in pairs:
            kernel(ATTENTION, 4 * heads * head_dim * each, q, k, v, out, lse)
        if calls > 1:  # merged in one launch, here as of all rows
            kernel(MERGE, 0, *[out, lse] * 3)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pairs = pairs
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        made = None
        for pairs in ctx.pairs:
            # five products of each pair, where forward has two
            flops = 10 * q.shape[1] * q.shape[3] * pairs
            kernel(ATTENTION_BACKWARD, flops, q, k, v, out, d_out, lse, q, k, v)
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

    def __init__(self, layout: PrefixLayout):
        self.pairs = attended_pairs(layout)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        return _Flash.apply(q, k, v, self.pairs)  # type: ignore[return-value]


def attended_pairs(layout: PrefixLayout) -> list[int]:
    """Pairs of rows and keys: causal ones of all prompts and branches, and, if there are branches, of branches and
    their prompts."""
    groups = list(zip(layout.prompt_lengths, layout.branch_lengths, strict=True))
    causal = sum(n * (n + 1) // 2 for prompt, branches in groups for n in (prompt, *branches))
    prefix = sum(prompt * sum(branches) for prompt, branches in groups)
    return [causal, prefix] if prefix else [causal]


class Prefill(FlashPacked):
    """The attention of prompts in one row, which writes their keys and values to the KV cache."""

    def __init__(self, layout: PrefixLayout):
        super().__init__(layout)
        self.prompts = len(layout.prompt_lengths)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        for new in (k, v):
            for _ in range(self.prompts):
                kernel("copy_", 0, 2 * new.nbytes / self.prompts)
        return super().attend(layer, q, k, v, scale)


class Streaming:
    """The attention of a decode step, which copies no keys and values: it reads `rows` rows of the KV cache for so many
    `pairs` of queries and keys."""

    def __init__(self, rows: int = 0, pairs: int = 0):
        self.rows, self.pairs = rows, pairs

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        for new in (k, v):
            kernel("index_copy_", 0, new, new)
        self.read(q, k)
        return torch.empty_like(q)

    def read(self, q: Tensor, k: Tensor) -> None:
        """Tell of both kernels, for queries [S, H, 1, Dh] and keys like k [S, Hkv, 1, Dh]."""
        cached = 2 * self.rows * k.shape[1] * k.shape[3] * k.itemsize
        kernel(DECODE, 4 * self.pairs * q.shape[1] * q.shape[3], cached, q)
        kernel(DECODE, 0, q)  # its second launch merges the chunks


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
        kernel("sample_statistics", 0, logits, *held[-1:])
        kernel("sample_choice", 0, *held, 4 * rows * SAMPLING_BLOCK)


def _tower(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    query, key = query.to(value.dtype), key.to(value.dtype)
    offsets = options.get("cu_seq_lens_q")
    lengths = torch.tensor([query.shape[2]] * len(query)) if offsets is None else offsets.diff()
    return _Flash.apply(query, key, value, [int(lengths.square().sum())]).transpose(1, 2), None  # type: ignore[union-attr]


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
        _head_kernels(hidden, weight, rows, block, accumulates=trained and not at_once)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        for gradient in ctx.saved_tensors:
            if gradient is not None:
                kernel("mul_", 0, gradient, gradient)  # by the gradient of the loss
        return *ctx.saved_tensors, None, None


def _head_kernels(hidden: Tensor, weight: Tensor, chunk: int, block: int, *, accumulates: bool) -> None:
    """Tell of the kernels of `linear_grpo_loss`: each chunk is projected, its logits are read twice and their gradient
    is written; blocks of gradients are consumed by two products."""
    size, (vocabulary, width) = hidden.itemsize, weight.shape
    operand, wide = size * weight.numel(), size < 4
    for rows in _chunks(len(hidden), chunk):
        _project(hidden, weight, rows)
        kernel("loss", 0, (8 + size) * rows * vocabulary)
    for number, rows in enumerate(_chunks(len(hidden), block)):
        flops, gradient = 2 * rows * vocabulary * width, size * rows * vocabulary
        kernel("mm", flops, gradient, operand, 4 * rows * width)
        if weight.requires_grad:
            passes = 4 * (1 + (number > 0)) if accumulates else weight.itemsize
            kernel("addmm", flops, gradient, size * rows * width, passes * weight.numel())
    if wide and weight.dtype != hidden.dtype:
        kernel("_to_copy", 0, weight, operand)


def _project(hidden: Tensor, weight: Tensor, rows: int) -> None:
    vocabulary, width = weight.shape
    kernel("mm", 2 * rows * vocabulary * width, hidden.itemsize * (rows + vocabulary) * width, 4 * rows * vocabulary)


def _chunks(rows: int, chunk: int) -> list[int]:
    return [min(chunk, rows - start) for start in range(0, rows, chunk)]


def head_loss(hidden: Tensor, weight: Tensor) -> Tensor:
    """Allocate what `linear_grpo_loss` does."""
    chunk, block = chunks_of(hidden, weight)
    return _Head.apply(hidden, weight, chunk, block)  # type: ignore[return-value]


def head_logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
    """Allocate what `linear_logprob` does without gradient: [N]."""
    chunk = chunks_of(hidden, weight)[0]
    hidden.new_empty(chunk, len(weight), dtype=torch.float32)
    for rows in _chunks(len(hidden), chunk):
        _project(hidden, weight, rows)
        kernel("logprob", 0, 4 * rows * len(weight))
    return hidden.new_empty(len(hidden), dtype=torch.float32)


def chunks_of(hidden: Tensor, weight: Tensor) -> tuple[int, int]:
    """Numbers of rows that are projected and that are consumed at once on a GPU."""
    needs: Any = {"device": torch.device("cuda"), "requires_grad": weight.requires_grad}
    rows, columns = (SimpleNamespace(shape=each.shape, dtype=each.dtype, **needs) for each in (hidden, weight))
    chunk, block = chunk_rows(rows, columns, None)  # type: ignore[reportArgumentType]
    return min(len(hidden), chunk), min(len(hidden), block)
