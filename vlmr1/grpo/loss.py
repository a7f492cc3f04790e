"""Hidden rows (or log-probs) -> loss and metrics; the arithmetic is in vlmr1_kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmr1.types import Group, Pack
from vlmr1_kernels import GRPOSettings, grpo_loss, linear_grpo_loss


class PackLoss(Protocol):
    """The loss of a pack: from the rows that predict its completions, or from their log-probs and entropies."""

    @property
    def has_entropy_bonus(self) -> bool: ...
    def fused(self, hidden: Tensor, head: nn.Linear, pack: Pack) -> tuple[Tensor, dict[str, Tensor]]: ...
    def from_logprobs(
        self, logp: Tensor, pack: Pack, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class Objective:
    """GRPO settings with the count of the whole step that the loss type divides by."""

    settings: GRPOSettings
    normalizer: float

    @property
    def has_entropy_bonus(self) -> bool:
        return self.settings.entropy_coef != 0

    def fused(
        self, hidden: Tensor, head: nn.Linear, pack: Pack, *, accumulate: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden [N, D] -> loss [], metrics. With `accumulate` no engine waits for gradients of the head: backward adds
        them to `.grad` without autograd where the weight has no hook either."""
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        weight, targets = head_weight(head, hidden.dtype), pack.targets.to(hidden.device)
        inputs = {"settings": self.settings, "normalizer": self.normalizer, **_sequence_inputs(pack, hidden.device)}
        accumulate = accumulate and is_plain_leaf(weight)
        return linear_grpo_loss(hidden, weight, targets, bias=bias, accumulate_grad=accumulate, **inputs)

    def from_logprobs(
        self, logp: Tensor, pack: Pack, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """logp [N] -> loss [], metrics; a bonus for entropy needs the entropies [N] of what was drawn from."""
        inputs = _sequence_inputs(pack, logp.device)
        settings = self.settings if entropy is None else replace(self.settings, entropy_coef=0.0)
        loss, metrics = grpo_loss(logp, settings=settings, normalizer=self.normalizer, **inputs)
        if entropy is None:
            return loss, metrics
        if self.settings.entropy_coef != 0:
            loss = loss - self.settings.entropy_coef * (self.row_weights(inputs["seq_ids"]) * entropy).sum()
        return loss, metrics | {"entropy": entropy.detach().mean()}

    def row_weights(self, seq_ids: Tensor) -> Tensor:
        """[N]: the weight of each row's loss in the sum that is the loss."""
        weight = torch.ones_like(seq_ids, dtype=torch.float32) / self.normalizer
        if self.settings.loss_type in ("grpo", "gspo"):
            return weight / torch.bincount(seq_ids)[seq_ids]
        return weight / (self.settings.max_completion_length or 1) if self.settings.loss_type == "dr_grpo" else weight


def head_weight(head: nn.Linear, dtype: torch.dtype) -> Tensor:
    """Return the weight as the ops take it with hidden rows of `dtype`: float32 as it is, for a float32 gradient."""
    weight = head.weight
    return weight if weight.dtype == torch.float32 and dtype.itemsize == 2 else weight.to(dtype)


def is_plain_leaf(weight: Tensor) -> bool:
    """Return whether nothing but `weight.grad` gets the gradient of the weight: no sharded or quantized tensor, no
    hook, as of optimizers that step in backward."""
    hooks = weight._backward_hooks, getattr(weight, "_post_accumulate_grad_hooks", None)
    return weight.is_leaf and type(weight) in (Tensor, nn.Parameter) and not any(hooks)


def _sequence_inputs(pack: Pack, device: torch.device) -> dict[str, Any]:
    given = {name: getattr(pack, name) for name in ("seq_ids", "advantages", "old_logp", "ref_logp")}
    given["sampling_logp"] = pack.importance_denominator
    return {name: None if value is None else value.to(device) for name, value in given.items()}


def normalizer(groups: Sequence[Group], settings: GRPOSettings, *, mask_truncated: bool = False) -> float:
    """Return the divisor of this rank's loss of a step: sequences for means over sequences, tokens for means over
    tokens. Sequences of masked truncated completions count, their tokens do not, as in TRL."""
    completions = [c for group in groups for c in group.completions]
    if settings.loss_type in ("grpo", "gspo", "dr_grpo"):
        return float(len(completions))
    return float(sum(len(c.token_ids) for c in completions if not (mask_truncated and c.finish_reason == "length")))


def clipped_shares(logp: Tensor, pack: Pack, settings: GRPOSettings) -> dict[str, Tensor]:
    """Minimum over completions of the share of tokens that the lower bound clips, and maximum of that of the upper."""
    if pack.old_logp is None or pack.advantages is None or settings.loss_type == "cispo":
        nothing = torch.zeros((), device=logp.device)
        return {"clip_low_min": nothing, "clip_high_max": nothing}
    of, advantages = pack.seq_ids.to(logp.device), pack.advantages.to(logp.device)  # [N], [B]

    def means(values: Tensor) -> Tensor:
        return logp.new_zeros(len(advantages)).index_add(0, of, values.to(logp.dtype)) / torch.bincount(of)

    log_ratio = logp - pack.old_logp.to(logp.device)
    ratio = (means(log_ratio)[of] if settings.sequence_level else log_ratio).exp()
    low = (ratio < 1 - settings.epsilon_low) & (advantages[of] < 0)
    high = (ratio > 1 + settings.epsilon_high) & (advantages[of] > 0)
    return {"clip_low_min": means(low).min(), "clip_high_max": means(high).max()}


def logp_difference(logp: Tensor, pack: Pack) -> dict[str, Tensor]:
    """Mean and maximum of the difference between the policy's log-probs [N] and those that the engine reported."""
    if pack.rollout_logp is None:
        return {}
    differences = (logp - pack.rollout_logp.to(logp.device)).abs()
    return {"rollout/logp_difference": differences.mean(), "rollout/logp_difference_max": differences.max()}
