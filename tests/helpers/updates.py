"""Updates of a trainer on given groups."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmr1.types import Group


def as_drawn(groups: Sequence[Group]) -> list[Group]:
    """The groups without what a trainer has added to their completions: the log-probs of reference and old policy."""
    facts: dict[str, Any] = {"old_logp": None, "ref_logp": None, "importance_denominator": None}
    return [replace(g, completions=tuple(replace(c, **facts) for c in g.completions)) for g in groups]


def update(trainer: Any, groups: Sequence[Group]) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of an update on groups that have their advantages; gradients are left on the parameters."""
    groups = as_drawn(groups)
    trainer.add_logprobs(trainer.model, groups)
    return trainer.backward(trainer.model, groups)
