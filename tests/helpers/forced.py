"""Completions that do not hang on rounding: one run draws tokens, others are made to draw the same ones, and report
their own log-probs of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from vlmr1.rollout.sampling import SamplingSettings, sample_tokens

Chosen = tuple[Tensor, Tensor, Tensor]
Tokens = dict[float, int]  # by the uniform number, of which each prompt, branch and place has its own


def recording(tokens: Tokens) -> Callable[..., Chosen]:
    """`sample_tokens`; what it draws goes to `tokens`."""

    def record(logits: Tensor, banned: Tensor, settings: SamplingSettings, draws: Tensor, seen: None = None) -> Chosen:
        chosen = sample_tokens(logits, banned, settings, draws, seen)
        tokens.update(zip(draws.tolist(), chosen[0].tolist(), strict=True))
        return chosen

    return record


def repeating(tokens: Tokens) -> Callable[..., Chosen]:
    """`sample_tokens` that draws these tokens."""

    def repeat(logits: Tensor, banned: Tensor, settings: SamplingSettings, draws: Tensor, seen: None = None) -> Chosen:
        chosen = torch.tensor([tokens[draw] for draw in draws.tolist()])
        logp = torch.log_softmax(logits.float() / settings.temperature, -1)  # [B, V]
        lost = torch.log1p(-logp[:, banned].exp().sum(-1))
        of_chosen = logp.gather(-1, chosen[:, None])[:, 0]
        return chosen, of_chosen, of_chosen - lost

    return repeat
