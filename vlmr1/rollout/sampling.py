"""Choosing the next token. Random numbers depend on (seed, step, prompt, branch, position) and on nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_U64 = np.uint64
_MASK = _U64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class SamplingSettings:
    """How a rollout draws: `greedy` takes the most probable token and ignores the seed."""

    max_completion_length: int
    temperature: float = 1.0
    greedy: bool = False
    seed: int = 0


def mix(*keys: np.ndarray | int) -> np.ndarray:
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
    return (mix(*keys) >> _U64(11)).astype(np.float64) * 2.0**-53


def choose(
    logits: Tensor, banned: Tensor, settings: SamplingSettings, draws: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens from logits [B, V]; `banned` ids are never chosen, `draws` [B] are uniform in [0, 1).

    Returns token ids [B], `logp` [B] of the full distribution at the temperature, and `sampling_logp` [B] of the
    distribution drawn from."""
    full = torch.log_softmax(logits.float() / settings.temperature, -1)  # [B, V]
    allowed = full.index_fill(-1, banned, float("-inf"))
    if settings.greedy:
        tokens = allowed.argmax(-1)
    else:
        cumulative = (allowed - allowed.amax(-1, keepdim=True)).double().exp().cumsum(-1)  # [B, V]
        target = torch.from_numpy(draws).to(logits.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    chosen = tokens[:, None]
    logp = full.gather(-1, chosen)[:, 0]
    return tokens, logp, logp - allowed.logsumexp(-1)
