"""Apple's cut-cross-entropy: log-probs without logits in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.compare import Unavailable

NOTE = (
    "cut-cross-entropy at its default filter, which drops blocks of small softmax whatever their upstream "
    "gradient; the gradient of the head is summed in the dtype of the model; the objective is the eager one"
)


def log_probs(hidden: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """hidden [N, D], weight [V, D], targets [N] -> logp [N]; for rows like `hidden`."""
    from cut_cross_entropy import linear_cross_entropy

    if hidden.device.type != "cuda":
        raise Unavailable("cut-cross-entropy runs on cuda")
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable(f"the backward of cut-cross-entropy serves half precision, not {hidden.dtype}")

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, targets, reduction="none")

    return run
