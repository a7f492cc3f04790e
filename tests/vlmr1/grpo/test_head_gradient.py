"""Where the head's gradient is added to `.grad` in its backward, and that updates are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.maker import Maker
from tests.helpers.steps import near_the_policy, trainer_of
from tests.helpers.updates import update
from vlmr1.grpo.loss import head_weight, is_plain_leaf


class Sharded(nn.Parameter):
    """A parameter that an engine or a quantizer has replaced by its own kind."""


def test_accumulating_leaves_the_gradients_of_an_update(model: Any, processor: Any, make: Maker, tmp_path: Path):
    groups = near_the_policy(make, model, make.groups(("Locate 7.", (), (5, 9, 3)), ("What is seven?", (), (4, 9))))
    trainer = trainer_of(model, processor, tmp_path, tokens_per_pack=48, beta=0.0)
    head = trainer.policy.family.head(trainer.policy.model).weight
    assert not trainer.policy.accumulates_head, "on a CPU"
    assert is_plain_leaf(head)
    loss, metrics, expected = update(trainer, groups)
    assert metrics["packs"] > 1

    trainer.model.zero_grad()
    trainer.policy.accumulates_head, calls = True, []
    hook = head.register_hook(lambda _: calls.append("head"))
    assert not is_plain_leaf(head)
    update(trainer, groups)
    hook.remove()
    assert calls, "a hooked weight gets its gradient from autograd"
    trainer.model.zero_grad()
    loss_, _, found = update(trainer, groups)
    assert loss_ == loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["computed", "sharded", "post-accumulate hook", "plain"])
def test_plain_leaves(kind: str):
    weight: Any = Sharded(torch.ones(2, 2)) if kind == "sharded" else nn.Parameter(torch.ones(2, 2))
    if kind == "post-accumulate hook":
        weight.register_post_accumulate_grad_hook(lambda _: None)
    assert is_plain_leaf(2 * weight if kind == "computed" else weight) is (kind == "plain")


def test_only_float32_weights_stay_wider_than_hidden():
    head = nn.Linear(2, 3, bias=False)
    assert head_weight(head, torch.bfloat16) is head.weight
    assert head_weight(head, torch.float64).dtype == torch.float64
    assert head_weight(head.bfloat16(), torch.bfloat16) is head.weight
