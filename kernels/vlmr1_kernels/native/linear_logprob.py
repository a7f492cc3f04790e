"""Log-probs and entropies of an output head on the native library; backward recomputes the logits."""

from ctypes import byref

import torch
from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.native import library


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias, targets = library.prepare_inputs(hidden, weight, bias, targets)
    out = torch.empty(3, hidden.shape[0])  # logp, entropy, lse
    head, rows = library.head(weight, bias, temperature, softcap), library.hidden_rows(hidden, targets)
    library.call(
        "vlmr1_linear_logprob", byref(head), byref(rows), torch.get_num_threads(), *(row.data_ptr() for row in out)
    )
    logp, token_entropy, lse = (row.clone() for row in out)
    return logp, token_entropy if entropy else logp.new_empty(0), lse


def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    d_logp: Tensor,
    d_entropy: Tensor,
    temperature: float,
    softcap: float | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias, targets = library.prepare_inputs(hidden, weight, bias, targets)
    d_hidden, d_weight, d_bias = gradients(hidden, weight, needs_hidden, needs_weight, needs_bias)
    head, rows = library.head(weight, bias, temperature, softcap), library.hidden_rows(hidden, targets)
    library.call(
        "vlmr1_linear_logprob_backward",
        byref(head),
        byref(rows),
        max(chunk, 1),
        torch.get_num_threads(),
        *map(library.pointer, (d_logp, d_entropy, d_hidden, d_weight, d_bias)),
    )
    return d_hidden, d_weight, d_bias.to(weight.dtype)


def gradients(
    hidden: Tensor, weight: Tensor, needs_hidden: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return uninitialized d_hidden, d_weight and d_bias (float32); [0] if not needed."""
    return (
        torch.empty(hidden.shape if needs_hidden else (0,), dtype=hidden.dtype),
        torch.empty(weight.shape if needs_weight else (0,), dtype=weight.dtype),
        torch.empty(weight.shape[:1] if needs_bias else (0,)),
    )


linear_logprob = custom_ops.linear_logprob("native", _forward, _backward, library.chunk_rows)
