"""Log-probs and entropies of an output head: one GEMM per chunk; backward recomputes the logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.inputs import HeadInputs, Needs
from vlmr1_kernels.triton.head import Head
from vlmr1_kernels.triton.launch import on_tensor_device


@on_tensor_device
def _forward(inputs: HeadInputs, entropy: bool, chunks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    head, hidden = Head(inputs, chunks), inputs.hidden
    logp, lse = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2))  # [N]
    token_entropy = torch.empty_like(logp) if entropy else None
    for rows in (rows for block in head.blocks for rows in block):
        head.project(rows)
        head.statistics(rows, logp, token_entropy, lse)
    return logp, logp.new_empty(0) if token_entropy is None else token_entropy, lse


@on_tensor_device
def _backward(
    inputs: HeadInputs, lse: Tensor, entropy: Tensor, d_logp: Tensor, d_entropy: Tensor, needs: Needs,
    chunks: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scaled = inputs.hidden.dtype == torch.float16 and len(inputs.hidden) > 0
    head = Head(inputs, chunks, needs, torch.float32 if scaled else None)
    slopes = [d_logp, d_entropy] if len(entropy) else [d_logp]
    factor = None
    if scaled:
        # Scale to about 1, so that the gradient of the logits does not underflow in float16; a power of two is exact.
        factor = torch.stack(slopes).abs().amax().log2().ceil().clamp(-100, 100).exp2()
        slopes = [slope / factor for slope in slopes]
    for block in head.blocks:
        for rows in block:
            head.project(rows)
            head.gradient(rows, lse, entropy, slopes[0], slopes[1] if len(slopes) > 1 else None)
        head.consume(block)
    return head.gradients(factor)


linear_logprob = custom_ops.linear_logprob("triton", _forward, _backward)
