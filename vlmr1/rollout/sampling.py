"""Token sampling. Random numbers depend on seed, step, prompt, sequence and token index alone, not on the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_U64 = np.uint64


@dataclass(frozen=True)
class SamplingSettings:
    """Sampling of a rollout: `greedy` takes the most probable token and ignores the seed.

    A token is drawn at `temperature` from what penalty, top_k, top_p and min_p leave, in this order, as `generate`
    applies them; each is off by default."""

    max_completion_length: int
    temperature: float = 1.0
    greedy: bool = False
    seed: int = 0
    top_k: int = 0  # the k most probable tokens; 0: all
    top_p: float = 1.0  # the most probable tokens that together have this probability
    min_p: float = 0.0  # those with at least this share of the greatest probability
    repetition_penalty: float = 1.0  # logits of tokens in prompt or completion: divided if positive, else multiplied
    stop: tuple[str, ...] = ()  # a completion ends with the token that completes one of these


def hash_keys(*keys: np.ndarray | int) -> np.ndarray:
    """Hash integer keys (broadcast against each other) to uniform 64-bit words: chained SplitMix64 finalizers
    (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        state = _U64(0)
        for key in keys:
            z = (state ^ np.asarray(key).astype(np.uint64)) + _U64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
            state = z ^ (z >> _U64(31))
    return np.asarray(state)


def uniform(*keys: np.ndarray | int) -> np.ndarray:
    """Uniform float64 in [0, 1) from the hash of the keys."""
    return (hash_keys(*keys) >> _U64(11)).astype(np.float64) * 2.0**-53


def sample_tokens(
    logits: Tensor, suppressed_ids: Tensor, settings: SamplingSettings, draws: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the next tokens by inverting the cumulative distribution at `draws`.

    Args:
        logits: [B, V].
        suppressed_ids: [n] int64 token ids that are never sampled.
        draws: [B] float64, uniform in [0, 1).
        seen: [B, V] bool, True at the tokens that the repetition penalty applies to.

    Returns:
        Token ids [B] int64; `logp` [B] float32 of the full distribution at the temperature; `sampling_logp` [B] float32
        of the distribution that was sampled from.
    """
    logits = logits.float()
    full = torch.log_softmax(logits / settings.temperature, -1)  # [B, V]
    allowed = full
    if seen is not None and settings.repetition_penalty != 1:
        penalized = torch.where(logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty)
        allowed = torch.where(seen, penalized, logits) / settings.temperature
    allowed = _truncated(allowed.index_fill(-1, suppressed_ids, float("-inf")), settings)
    if settings.greedy:
        tokens = allowed.argmax(-1)
    else:
        cumulative = (allowed - allowed.amax(-1, keepdim=True)).double().exp().cumsum(-1)  # [B, V]
        target = draws[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    chosen = tokens[:, None]
    sampling_logp = allowed.gather(-1, chosen)[:, 0] - allowed.logsumexp(-1)
    return tokens, full.gather(-1, chosen)[:, 0], sampling_logp


def _truncated(scores: Tensor, settings: SamplingSettings) -> Tensor:
    """Return scores [B, V], -inf at the tokens that top_k, top_p or min_p exclude; the most probable one remains."""
    if 0 < settings.top_k < scores.shape[-1]:
        least = scores.topk(settings.top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if settings.top_p < 1:
        ordered, order = scores.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)  # [B, V] total probability of the more probable tokens
        before[:, 0] = 0
        excluded = torch.empty_like(before, dtype=torch.bool).scatter_(-1, order, before >= settings.top_p)
        scores = scores.masked_fill(excluded, float("-inf"))
    if settings.min_p > 0:
        least = scores.amax(-1, keepdim=True) + math.log(settings.min_p)
        scores = scores.masked_fill(scores < least, float("-inf"))
    return scores
