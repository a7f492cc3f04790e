"""How others write the log-probs of a head and the GRPO objective on them: eager, compiled, and by peers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.compare import Arm, Outputs
from benchmarks.head import SETTINGS, Inputs
from benchmarks.peers import cce, trl_head

LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [N, D], weight [V, D], targets [N] -> logp [N]

EAGER_NOTE = "as VLM-R1: all logits, log_softmax and gather a sequence, in the dtype of the model"
COMPILED_NOTE = "torch.compile of eager code with a float32 log-sum-exp, shapes static"


def objective(logp: Tensor, old: Tensor, ref: Tensor, advantages: Tensor) -> Tensor:
    """The loss of each sequence, [B], from log-probs [B, L]."""
    ratio = torch.exp(logp - old)
    clipped = ratio.clamp(1 - SETTINGS.epsilon_low, 1 + SETTINGS.epsilon_high)
    policy = -torch.min(ratio * advantages[:, None], clipped * advantages[:, None])
    difference = ref - logp
    return (policy + SETTINGS.beta * (torch.exp(difference) - difference - 1)).mean(1)


def eager_log_probs(length: int) -> LogProb:
    def log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = (hidden @ weight.T).split(length)  # B of [L, V]
        pairs = zip(logits, targets.split(length), strict=True)
        return torch.cat([each.log_softmax(-1).gather(1, ids[:, None])[:, 0] for each, ids in pairs])

    return log_probs


def plain_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All rows at once: what a compiler fuses best."""
    logits = (hidden @ weight.T).float()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def loss_of(inputs: Inputs, log_probs: LogProb) -> Callable[[Tensor, Tensor], Tensor]:
    """Hidden rows and head to the loss."""
    old, ref = inputs.padded(inputs.old_logp), inputs.padded(inputs.ref_logp)
    targets, advantages = inputs.targets, inputs.advantages

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logp = log_probs(hidden, weight, targets).view_as(old)
        return objective(logp, old, ref, advantages).mean()

    return loss


def loss_and_gradients(inputs: Inputs, loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Outputs]:
    def run() -> Outputs:
        value = loss(inputs.hidden, inputs.weight)
        return {"loss": value.detach()} | inputs.differentiate(value)

    return run


def log_probs_and_gradients(inputs: Inputs, log_probs: LogProb) -> Callable[[], Outputs]:
    def run() -> Outputs:
        value = log_probs(inputs.hidden, inputs.weight, inputs.targets)
        return {"logp": value.detach()} | inputs.differentiate(value, inputs.upstream.to(value.dtype))

    return run


def log_prob_arms(inputs: Inputs, finish: Callable[[LogProb], Callable[[], Outputs]]) -> dict[str, Callable[[], Arm]]:
    """The arms that differ in their log-probs only; `finish` makes the measured call of one."""
    case = inputs.case

    def eager() -> Arm:
        # logits, their log_softmax a sequence, and in backward the gradients of both
        needs = (4 if case.mode != "no_grad" else 2) * case.logits_bytes
        return Arm(finish(eager_log_probs(inputs.length)), case.loose, EAGER_NOTE, needs=needs)

    def peer(make: Callable[[], LogProb], note: str) -> Callable[[], Arm]:
        return lambda: Arm(finish(make()), case.loose, note, peer=True)

    return {
        "eager": eager,
        "trl": peer(trl_head.log_probs, trl_head.NOTE),
        "cce": peer(lambda: cce.log_probs(inputs.hidden), cce.NOTE),
    }


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    torch._dynamo.reset()  # each case is compiled on its own, and the number of variants is limited
    return torch.compile(function, dynamic=False)


def compiled_arm(inputs: Inputs, run: Callable[[], Outputs]) -> Arm:
    case = inputs.case
    needs = 4 * case.rows * case.vocabulary + 2 * case.logits_bytes
    return Arm(run, case.loose, COMPILED_NOTE, peer=True, needs=needs, compiled=True)
