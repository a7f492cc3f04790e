"""Log-probs of a head and the GRPO loss on them by eager code, TRL, Liger and cut-cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.op_calls import Unavailable
from vlmr1_kernels import GRPOSettings

LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, D], weight [V, D], targets [N] -> logp [N]
SETTINGS = GRPOSettings(beta=0.04)  # grpo, k3, epsilon 0.2, temperature 1: VLM-R1's
EAGER_NOTE = "as VLM-R1: all logits, log_softmax and gather a sequence, in the dtype of the model"
TRL_NOTE = "TRL's ChunkedLogProbFunction with entropy, in its tiles of 4096 rows; the objective is the eager one"
LIGER_NOTE = "LigerFusedLinearGRPOLoss, all sequences one chunk; logits rounded to the dtype of the model"
CCE_NOTE = "cut-cross-entropy at its default filter; the objective is the eager one"


def objective(logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor) -> Tensor:
    """Return the loss of each sequence, [B], from log-probs [B, L]."""
    ratio = torch.exp(logp - old)
    clipped = ratio.clamp(1 - SETTINGS.epsilon_low, 1 + SETTINGS.epsilon_high)
    policy = -torch.min(ratio * advantages[:, None], clipped * advantages[:, None])
    difference = ref - logp
    return (policy + SETTINGS.beta * (torch.exp(difference) - difference - 1)).mean(1)


def gathered(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def eager(length: int) -> LogProb:
    def log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = (hidden @ weight.T).split(length)  # B of [L, V]
        return torch.cat([gathered(*pair) for pair in zip(logits, targets.split(length), strict=True)])

    return log_probs


def trl() -> LogProb:
    """TRL's fused head; ImportError where TRL has none."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk  # backward imports the module too

    def log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("entropy",))[0]

    return log_probs


def cut_cross_entropy(hidden: Tensor) -> LogProb:
    """Apple's cut-cross-entropy, for rows like `hidden`."""
    from cut_cross_entropy import linear_cross_entropy

    if hidden.device.type != "cuda":
        raise Unavailable("cut-cross-entropy runs on cuda")
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable(f"the backward of cut-cross-entropy serves half precision, not {hidden.dtype}")
    return lambda hidden, weight, targets: -linear_cross_entropy(hidden, weight, targets, reduction="none")


def liger(targets: Tensor, old: Tensor, ref: Tensor, advantages: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's GRPO loss, fused with the head; targets and log-probs are [B, L]."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    options = {name: getattr(SETTINGS, name) for name in ("beta", "epsilon_low", "epsilon_high", "temperature")}
    options |= {"compiled": old.is_cuda, "chunk_size": len(advantages), "loss_type": "grpo", "use_ref_model": True}
    function = LigerFusedLinearGRPOLoss(**options)
    given = {"ref_per_token_logps": ref, "old_per_token_logps": old}
    mask = torch.ones_like(targets, dtype=torch.float32)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden.view(*targets.shape, -1)  # [B, L, D]
        return function(rows, weight, targets, mask, advantages, **given)[0]

    return loss
