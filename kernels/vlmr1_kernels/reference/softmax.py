"""A chunk of rows: hidden -> log-probs over the vocabulary -> gradient of the logits."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vlmr1_kernels.inputs import HeadInputs
from vlmr1_kernels.linear import accumulate_weight_grad, accumulation_dtype, gemm_operand, hidden_grad, project


@dataclass
class Head:
    """Output head with GEMM-ready weight, and the accumulators of its gradient."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    temperature: float
    softcap: float | None
    d_weight: Tensor | None = None  # [V, D] accumulation dtype; None: frozen
    d_bias: Tensor | None = None  # [V]

    @classmethod
    def of(cls, inputs: HeadInputs, needs_weight: bool = False, needs_bias: bool = False) -> "Head":
        """Return the head, with accumulators of the gradients that are needed."""
        hidden, weight, bias, _, temperature, softcap = inputs
        wide = accumulation_dtype(weight.dtype)
        d_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        d_bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if needs_bias else None
        return cls(gemm_operand(weight.to(hidden.dtype)), bias, temperature, softcap, d_weight, d_bias)

    def gradients(self, inputs: HeadInputs) -> tuple[Tensor | None, ...]:
        """Return d_weight and d_bias in the dtypes of weight and bias; None if not needed."""
        pairs = (self.d_weight, inputs.weight), (self.d_bias, inputs.bias)
        return tuple(None if gradient is None or of is None else gradient.to(of.dtype) for gradient, of in pairs)


class Chunk:
    """Distributions over the vocabulary of n rows."""

    def __init__(self, head: Head, hidden: Tensor, targets: Tensor) -> None:
        self.head = head
        self.hidden = gemm_operand(hidden)  # [n, D]
        self.targets = targets.long()[:, None]  # [n, 1]
        self.slope: Tensor | None = None  # [n, V] derivative of the softcap
        if head.softcap is None:
            logits = project(self.hidden, head.weight, head.bias, head.temperature)
        else:
            squashed = project(self.hidden, head.weight, head.bias, head.softcap).tanh_()
            logits = squashed * (head.softcap / head.temperature)
            self.slope = 1 - squashed.square_()
        self.log_probs = torch.log_softmax(logits, dim=-1)  # [n, V]
        self.logp = self.log_probs.gather(1, self.targets)[:, 0]  # [n]

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities p [n, V]."""
        return self.log_probs.exp()

    @cached_property
    def weighted(self) -> Tensor:
        """p log p [n, V], computed in place of the log-probs."""
        return self.log_probs.mul_(self.probs)

    def entropy(self) -> Tensor:
        """Return -sum(p log p) [n]."""
        return -self.weighted.sum(-1)

    def backward(
        self, d_logp: Tensor, d_entropy: Tensor | None, entropy: Tensor | None, needs_hidden: bool
    ) -> Tensor | None:
        """Return d_hidden [n, D] and add to the gradients of the head; overwrites the chunk.

        With p the probabilities: d logp / d z = onehot - p, and d entropy / d z = -p * (log p + entropy).
        """
        one = self.probs.new_ones(())
        if d_entropy is None or entropy is None:
            # Apply the row's coefficient to the [n, D] operand of the GEMMs, which is smaller than [n, V].
            d_logits = self.probs.scatter_add_(1, self.targets, -one.expand_as(self.targets))
            factor = -d_logp[:, None]
        else:
            shift = (d_logp + d_entropy * entropy)[:, None]
            d_logits = self.weighted.mul_(d_entropy[:, None]).addcmul_(self.probs, shift).neg_()
            d_logits.scatter_add_(1, self.targets, d_logp[:, None])
            factor = one.expand(len(d_logp), 1)
        if self.slope is not None:
            d_logits.mul_(self.slope)
        factor = factor / self.head.temperature  # [n, 1]
        if self.head.d_weight is not None:
            accumulate_weight_grad(self.head.d_weight, d_logits, (self.hidden * factor).to(self.hidden.dtype))
        if self.head.d_bias is not None:
            self.head.d_bias.addmv_(d_logits.T, factor[:, 0])
        return hidden_grad(d_logits, self.head.weight).mul_(factor) if needs_hidden else None
