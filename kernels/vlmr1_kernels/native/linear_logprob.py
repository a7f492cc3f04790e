"""Log-probs and entropies of an output head on the native library; backward recomputes the logits."""

from ctypes import byref

import torch
from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.inputs import HeadInputs, Needs
from vlmr1_kernels.native import library


def _forward(head: HeadInputs, entropy: bool, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    head = library.prepare_inputs(head)
    out = torch.empty(3, head.hidden.shape[0])  # logp, entropy, lse
    structures = byref(library.head(head)), byref(library.hidden_rows(head))
    library.call("vlmr1_linear_logprob", *structures, torch.get_num_threads(), *(row.data_ptr() for row in out))
    logp, token_entropy, lse = (row.clone() for row in out)
    return logp, token_entropy if entropy else logp.new_empty(0), lse


def _backward(
    head: HeadInputs, lse: Tensor, entropy: Tensor, d_logp: Tensor, d_entropy: Tensor, needs: Needs, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    head = library.prepare_inputs(head)
    d_hidden, d_weight, d_bias = custom_ops.gradients_like(head.hidden, head.weight, needs)
    out = d_hidden, d_weight, d_bias.float()  # the library sums the bias in float32
    structures = byref(library.head(head)), byref(library.hidden_rows(head))
    addresses = map(library.pointer, (d_logp, d_entropy, *out))
    library.call("vlmr1_linear_logprob_backward", *structures, max(chunk, 1), torch.get_num_threads(), *addresses)
    return d_hidden, d_weight, out[2].to(head.weight.dtype)


linear_logprob = custom_ops.linear_logprob("native", _forward, _backward, library.chunk_rows)
