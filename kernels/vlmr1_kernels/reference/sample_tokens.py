"""Sampling of tokens from logits."""

import math

import torch
from torch import Tensor

from vlmr1_kernels.inputs import SamplingOptions
from vlmr1_kernels.linear import accumulation_dtype


def sample_tokens(
    logits: Tensor, draws: Tensor, suppressed_ids: Tensor | None, seen: Tensor | None, *, options: SamplingOptions
) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.to(accumulation_dtype(logits.dtype))
    full = torch.log_softmax(_tempered(logits, options.temperature), -1)  # [S, V]
    allowed = full
    if seen is not None and options.repetition_penalty != 1:
        penalized = torch.where(logits > 0, logits / options.repetition_penalty, logits * options.repetition_penalty)
        allowed = _tempered(torch.where(seen, penalized, logits), options.temperature)
    if suppressed_ids is not None:
        allowed = allowed.index_fill(-1, suppressed_ids, float("-inf"))
    allowed = _truncated(allowed, options)
    peak = allowed.amax(-1, keepdim=True)
    gaps = allowed - peak
    if options.greedy:
        tokens = allowed.argmax(-1)
    else:
        cumulative = gaps.to(torch.float64, copy=True).exp_().cumsum_(-1)  # [S, V]
        target = draws[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    chosen = tokens[:, None]
    lse = gaps.exp_().sum(-1).log_() + peak[:, 0]
    return tokens, full.gather(-1, chosen)[:, 0], allowed.gather(-1, chosen)[:, 0] - lse


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1 else logits / temperature


def _truncated(scores: Tensor, options: SamplingOptions) -> Tensor:
    """Return scores [S, V], -inf at the tokens that top_k, top_p or min_p exclude; the most probable one remains."""
    if 0 < options.top_k < scores.shape[-1]:
        least = scores.topk(options.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if options.top_p < 1:
        ordered, order = scores.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)  # [S, V] total probability of the more probable tokens
        before[:, 0] = 0
        excluded = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= options.top_p)
        scores = scores.masked_fill(excluded, float("-inf"))
    if options.min_p > 0:
        least = scores.amax(-1, keepdim=True) + math.log(options.min_p)
        scores = scores.masked_fill(scores < least, float("-inf"))
    return scores
