"""Token sampling. Random numbers depend on seed, step, prompt, sequence and token index alone, not on the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

import vlmr1_kernels
from vlmr1_kernels import SamplingOptions

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
    """Return the next tokens [S], their `logp` and their `sampling_logp`; see the op of this name."""
    options = SamplingOptions(**{name: getattr(settings, name) for name in SamplingOptions._fields})
    return vlmr1_kernels.sample_tokens(logits, draws, suppressed_ids, seen, options=options)
