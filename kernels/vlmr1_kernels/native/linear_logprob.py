"""Log-probs and entropies of an output head on the native library; backward recomputes the logits."""

from collections.abc import Sequence
from ctypes import byref

import torch
from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.inputs import HeadInputs, Needs
from vlmr1_kernels.native import library


def _forward(head: HeadInputs, entropy: bool, chunks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    head = library.prepare_inputs(head)
    out = torch.empty(3, head.hidden.shape[0])  # logp, entropy, lse
    structures = byref(library.head(head)), byref(library.hidden_rows(head))
    library.call("vlmr1_linear_logprob", *structures, torch.get_num_threads(), *(row.data_ptr() for row in out))
    logp, token_entropy, lse = (row.clone() for row in out)
    return logp, token_entropy if entropy else logp.new_empty(0), lse


def _backward(
    head: HeadInputs,
    lse: Tensor,
    entropy: Tensor,
    d_logp: Tensor,
    d_entropy: Tensor,
    needs: Needs,
    chunks: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    given, head = head.weight, library.prepare_inputs(head)
    d_hidden, d_weight, d_bias = custom_ops.gradients_like(head.hidden, given, needs)
    out = d_hidden, d_weight, d_bias.float()  # the library sums the bias in float32
    structures = byref(library.head(head)), byref(library.hidden_rows(head))
    upstream, gradients = map(library.pointer, (d_logp, d_entropy)), map(library.pointer, out)
    library.call(
        "vlmr1_linear_logprob_backward", *structures, chunks[0], torch.get_num_threads(), *upstream,
        library.DTYPES[given.dtype], *gradients,
    )  # fmt: skip
    return d_hidden, d_weight, out[2].to(head.hidden.dtype)


linear_logprob = custom_ops.linear_logprob("native", _forward, _backward, library.chunk_rows)
