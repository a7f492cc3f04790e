"""Log-probs and entropies of an output head, chunk by chunk; backward recomputes the logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmr1_kernels.inputs import HeadInputs
from vlmr1_kernels.linear import accumulation_dtype, chunk_rows
from vlmr1_kernels.reference.softmax import Chunk, Head


def linear_logprob(head: HeadInputs, *, entropy: bool, chunk_mib: float | None) -> tuple[Tensor, Tensor]:
    """Return (logp [N], entropy [N], or [0] if not requested)."""
    return _LinearLogprob.apply(*head, entropy, chunk_rows(head.hidden, head.weight, chunk_mib)[0])


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *values: Any) -> tuple[Tensor, Tensor]:
        inputs, (entropy, size) = HeadInputs(*values[:-2]), values[-2:]
        head, (hidden, weight, bias, targets, *_) = Head.of(inputs), inputs
        logp = hidden.new_empty(len(hidden), dtype=accumulation_dtype(hidden.dtype))  # [N]
        token_entropy = torch.empty_like(logp) if entropy else logp.new_empty(0)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            chunk = Chunk(head, hidden[rows], targets[rows])
            logp[rows] = chunk.logp
            if entropy:
                token_entropy[rows] = chunk.entropy()
        ctx.save_for_backward(hidden, weight, bias, targets, token_entropy)
        ctx.options = values[4:]
        return logp, token_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logp: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, token_entropy = ctx.saved_tensors
        temperature, softcap, entropy, size = ctx.options
        needs_hidden, *needs = ctx.needs_input_grad[:3]
        inputs = HeadInputs(hidden, weight, bias, targets, temperature, softcap)
        head = Head.of(inputs, *needs)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            chunk = Chunk(head, hidden[rows], targets[rows])
            through_entropy = (d_entropy[rows], token_entropy[rows]) if entropy else (None, None)
            gradient = chunk.backward(d_logp[rows], *through_entropy, needs_hidden)
            if d_hidden is not None and gradient is not None:
                d_hidden[rows] = gradient
        return d_hidden, *head.gradients(inputs), None, None, None, None, None
