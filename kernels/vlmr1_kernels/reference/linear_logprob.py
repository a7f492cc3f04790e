"""Log-probs and entropies of an output head, chunk by chunk; backward recomputes the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmr1_kernels.linear import accumulation_dtype, chunk_rows
from vlmr1_kernels.reference.softmax import Chunk, Head


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    chunk_mib: float | None,
) -> tuple[Tensor, Tensor]:
    """Return (logp [N], entropy [N], or [0] if not requested)."""
    size = chunk_rows(len(hidden), weight, chunk_mib)
    return _LinearLogprob.apply(hidden, weight, bias, targets, temperature, softcap, entropy, size)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        entropy: bool,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        head = Head.of(weight, bias, temperature, softcap)
        logp = hidden.new_empty(len(hidden), dtype=accumulation_dtype(hidden.dtype))  # [N]
        token_entropy = torch.empty_like(logp) if entropy else logp.new_empty(0)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            chunk = Chunk(head, hidden[rows], targets[rows])
            logp[rows] = chunk.logp
            if entropy:
                token_entropy[rows] = chunk.entropy()
        ctx.save_for_backward(hidden, weight, bias, targets, token_entropy)
        ctx.options = temperature, softcap, entropy, size
        return logp, token_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, token_entropy = ctx.saved_tensors
        temperature, softcap, entropy, size = ctx.options
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head = Head.of(weight, bias, temperature, softcap, needs_weight, needs_bias)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            chunk = Chunk(head, hidden[rows], targets[rows])
            through_entropy = (d_entropy[rows], token_entropy[rows]) if entropy else (None, None)
            gradient = chunk.backward(d_logp[rows], *through_entropy, needs_hidden)
            if d_hidden is not None and gradient is not None:
                d_hidden[rows] = gradient
        d_weight = None if head.d_weight is None else head.d_weight.to(weight.dtype)
        d_bias = None if head.d_bias is None else head.d_bias.to(weight.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None, None
