"""Liger's two GRPO losses: fused with the head, and its Triton kernel on logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.compare import Unavailable
from benchmarks.head import SETTINGS, Inputs

FUSED_NOTE = (
    "LigerFusedLinearGRPOLoss, all sequences one chunk (its own blocks of 2048 rows by 4096 tokens bound the "
    "memory); logits rounded to the dtype of the model, projected again, two of four GEMMs in float32"
)
LOGITS_NOTE = (
    "torch.mm, then triton_grpo_loss in place on the logits [B, L + 1, V]; the last row of a sequence is "
    "projected and not used; compiled anew for each L and V"
)


def fused_linear(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    function = LigerFusedLinearGRPOLoss(
        beta=SETTINGS.beta,
        compiled=inputs.case.device == "cuda",  # only the arithmetic on [B, L]
        use_ref_model=True,
        chunk_size=inputs.case.sequences,
        epsilon_low=SETTINGS.epsilon_low,
        epsilon_high=SETTINGS.epsilon_high,
        loss_type="grpo",
        temperature=SETTINGS.temperature,
    )
    targets = inputs.padded(inputs.targets)
    mask = torch.ones_like(targets, dtype=torch.float32)
    given = {
        "ref_per_token_logps": inputs.padded(inputs.ref_logp),
        "old_per_token_logps": inputs.padded(inputs.old_logp),
    }

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return function(inputs.padded(hidden), weight, targets, mask, inputs.advantages, **given)[0]

    return loss


def on_logits(inputs: Inputs) -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    if inputs.case.device != "cuda":
        raise Unavailable("Liger's Triton kernel runs on cuda")
    old, ref, targets = (inputs.padded(each) for each in (inputs.old_logp, inputs.ref_logp, inputs.targets))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = torch.nn.functional.pad(inputs.padded(hidden), (0, 0, 0, 1))  # [B, L + 1, D]
        return triton_grpo_loss(
            rows @ weight.T,
            old,
            ref,
            targets,
            inputs.advantages,
            temperature=SETTINGS.temperature,
            beta=SETTINGS.beta,
            eps_low=SETTINGS.epsilon_low,
            eps_high=SETTINGS.epsilon_high,
            loss_type="grpo",
            reduce=True,
        )[0]

    return loss
