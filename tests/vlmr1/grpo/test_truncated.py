"""mask_truncated_completions: what met the length limit leaves the loss, the KL included."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.maker import Maker
from tests.helpers.trainers import trainer_of
from tests.helpers.updates import update
from vlmr1.grpo.packing import make_pack
from vlmr1.types import Group


def groups_of(make: Maker) -> list[Group]:
    """The longest completion of a group is the truncated one."""
    return [
        make.group(make.prompt("Locate the digit 9.", (56,)), (3, 7, 2), (1.0, 0.4, -0.5)),
        make.group(make.prompt("What is seven?"), (6, 5), (0.7, 0.3)),
    ]


def backward(trainer: Any, groups: list[Group]) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    loss, metrics = update(trainer, groups)
    return float(loss), metrics, [p.grad for p in trainer.model.parameters()]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_truncated_completions_have_no_part(loss_type, model, processor, make, tmp_path):
    """The loss written out over the others: per-token losses at ratio r of the rollout's log-probs, no KL."""
    trainer = trainer_of(model, processor, tmp_path, mask_truncated_completions=True, loss_type=loss_type, beta=0.0)
    groups = groups_of(make)
    loss, metrics, _ = backward(trainer, groups)
    logp = trainer.policy.logprobs(make_pack(groups)).split([3, 7, 2, 6, 5])
    terms = []
    for row, i, advantage in ((0, 0, 1.0), (2, 2, -0.5), (4, 1, 0.3)):
        old = groups[row // 3].completions[i].logp
        ratio = (logp[row] - old).exp()
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
    expected = {
        "grpo": sum(term.mean() for term in terms) / 5,
        "dapo": torch.cat(terms).sum() / (3 + 2 + 5),
        "dr_grpo": torch.cat(terms).sum() / (5 * 8),
    }[loss_type]
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert (metrics["tokens"], metrics["dropped_rows"]) == (23, 13)


def test_where_all_are_truncated_nothing_moves(model, processor, make, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, mask_truncated_completions=True, beta=1.0)
    groups = [make.group(make.prompt("Locate the digit 9.", (56,)), (4, 4), (1.0, -1.0))]
    for parameter in trainer.reference.model.parameters():
        parameter.mul_(1.1)
    loss, _, gradients = backward(trainer, groups)
    assert loss == 0 and all(gradient is not None and not gradient.any() for gradient in gradients)
    off = trainer_of(model, processor, tmp_path, beta=1.0)
    assert backward(off, groups)[0] != 0
