"""Updates of a trainer on given groups."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmr1.types import Group

Step = tuple[float, dict[str, float], dict[str, Tensor]]  # loss, metrics and gradients by name


def as_drawn(groups: Sequence[Group]) -> list[Group]:
    """The groups without what a trainer has added to their completions: the log-probs of reference and old policy."""
    facts: dict[str, Any] = {"old_logp": None, "ref_logp": None, "importance_denominator": None}
    return [replace(g, completions=tuple(replace(c, **facts) for c in g.completions)) for g in groups]


def update(trainer: Any, groups: Sequence[Group]) -> Step:
    """An update on groups that have their advantages; gradients are left on the parameters."""
    groups = as_drawn(groups)
    trainer.add_logprobs(trainer.model, groups)
    return backward(trainer, groups)


def backward(trainer: Any, groups: Sequence[Group]) -> Step:
    """An update on groups that have log-probs too."""
    loss, metrics = trainer.backward(trainer.model, groups)
    return float(loss), metrics, gradients_of(trainer.model)


def gradients_of(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def generate(trainer: Any, groups: Sequence[Group]) -> Any:
    """The minibatch of one generation of the trainer from these completions and rewards on."""
    trainer.rollout = lambda prompts, number=0: as_drawn(groups)
    trainer.score = lambda groups: groups
    (minibatch,) = trainer.generate(trainer.model, [])
    return minibatch
