"""Cross-entropy of answer tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmr1.grpo.loss import head_weight
from vlmr1.types import Pack
from vlmr1_kernels import linear_logprob

LOGITS = 2**26  # bytes of logits that are held at once to find the most probable tokens


@dataclass(frozen=True)
class CrossEntropy:
    """Sum of -log p over a pack's answer tokens, divided by those of the whole update."""

    tokens: float  # of all packs and ranks
    has_entropy_bonus = False

    def fused(
        self, hidden: Tensor, head: nn.Linear, pack: Pack, *, accumulate: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden [N, D] -> loss [], metrics. `accumulate`, which the policy may allow, is not made use of."""
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        weight, targets = head_weight(head, hidden.dtype), pack.targets.to(hidden.device)
        logp, entropy = linear_logprob(hidden, weight, targets, bias=bias, entropy=True)
        loss, metrics = self.from_logprobs(logp, pack, entropy.detach())
        return loss, metrics | {"mean_token_accuracy": top_share(hidden, weight.to(hidden.dtype), bias, targets)}

    def from_logprobs(
        self, logp: Tensor, pack: Pack, entropy: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """logp [N] -> loss [], metrics."""
        counts = {"tokens": logp.new_tensor(len(logp)), "dropped_rows": logp.new_zeros(())}
        metrics = counts | {"logp": logp.detach()}
        if entropy is not None:
            metrics["entropy"] = entropy.detach().mean()
        return -logp.sum() / self.tokens, metrics


@torch.no_grad()
def top_share(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The share of rows whose target is the most probable token, a chunk of logits at a time."""
    size = max(1, LOGITS // (len(weight) * hidden.element_size()))
    right = hidden.new_zeros((), dtype=torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            logits = rows @ weight.T
            right += ((logits if bias is None else logits + bias).argmax(-1) == wanted).sum()
    return right / len(targets)
