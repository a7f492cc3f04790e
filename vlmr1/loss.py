"""Hidden rows (or log-probs) -> loss and metrics; the arithmetic is in vlmr1_kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmr1.types import Group, Pack
from vlmr1_kernels import GRPOSettings, grpo_loss, linear_grpo_loss

MAXIMA = ("ratio_max",)  # metrics that combine over packs by their maximum, not by their mean over tokens
COUNTS = ("tokens", "dropped_rows")


@dataclass(frozen=True)
class Objective:
    """GRPO settings with the count of the whole step that the loss type divides by."""

    settings: GRPOSettings
    normalizer: float

    def fused(self, hidden: Tensor, head: nn.Linear, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden [N, D] -> loss [], metrics."""
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        return linear_grpo_loss(
            hidden,
            head.weight.to(hidden.dtype),
            pack.targets.to(hidden.device),
            bias=bias,
            settings=self.settings,
            normalizer=self.normalizer,
            **_sequence_inputs(pack, hidden.device),
        )

    def of_logprobs(self, logp: Tensor, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]:
        """logp [N] -> loss [], metrics."""
        return grpo_loss(
            logp, settings=self.settings, normalizer=self.normalizer, **_sequence_inputs(pack, logp.device)
        )


def _sequence_inputs(pack: Pack, device: torch.device) -> dict[str, Any]:
    moved = {name: getattr(pack, name) for name in ("seq_ids", "advantages", "old_logp", "ref_logp")}
    return {name: None if value is None else value.to(device) for name, value in moved.items()}


def normalizer(groups: Sequence[Group], settings: GRPOSettings) -> float:
    """What this rank's loss of a step divides by: sequences for means over sequences, tokens for means over tokens."""
    completions = [c for group in groups for c in group.completions]
    if settings.loss_type in ("grpo", "gspo", "dr_grpo"):
        return float(len(completions))
    return float(sum(len(c.token_ids) for c in completions))


def combine(parts: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Metrics of a step from those of its packs: means weighted by tokens, maxima, sums of counts."""
    tokens = torch.stack([part["tokens"].double() for part in parts])  # [packs]
    out = {}
    for name in parts[0]:
        if name == "logp":
            continue
        values = torch.stack([part[name].double() for part in parts])
        if name in MAXIMA:
            out[name] = float(values.max())
        elif name in COUNTS:
            out[name] = float(values.sum())
        else:
            out[name] = float((values * tokens).sum() / tokens.sum().clamp(min=1))
    return out
