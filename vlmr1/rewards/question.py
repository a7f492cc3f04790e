"""The question template of each row; `auto` chooses it by what the rewards read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmr1.data.templates import AUTO, TEMPLATES, question_text
from vlmr1.rewards.methods import METHOD, METHOD_REWARDS
from vlmr1.types import Sample

BY_METHOD = {  # of accuracy, or the reward of that name; for any other method: default
    **dict.fromkeys(("iou", "iou_qwen", "iou_internvl", "iou_glm"), "rec"),
    **dict.fromkeys(("map", "od_ap", "od_ap50", "odLength", "weighted_sum"), "odLength"),
    "point_in_box": "gui",
}
BY_REWARD = BY_METHOD | dict.fromkeys(("format_rec_qwen", "format_rec_internvl", "format_rec_glm"), "rec")
BY_REWARD |= dict.fromkeys(("format", "counting"), "default")


def auto_template(rewards: Sequence[str], method: str) -> str:
    """Return the name of the template for a row with this accuracy method.

    The method decides where a reward reads it, else the first reward whose answers have a form. Rewards that look at
    no answer, and functions of the user's own, leave the turn as it is."""
    if any(reward in METHOD_REWARDS for reward in rewards):
        return BY_METHOD.get(str(method), "default")
    return next((BY_REWARD[reward] for reward in rewards if reward in BY_REWARD), "none")


@dataclass
class Question:
    """The template of the setting, or for `auto` the one of each row. `counts` are of rows passed to `count`."""

    template: str
    rewards: Sequence[str]
    method: str  # of rows without a column of their own
    model_type: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    last: int | None = None  # the `Sample.index` of the row counted last

    def __call__(self, columns: Mapping[str, Any]) -> str:
        """Return the text for a row."""
        return question_text(self.name(columns), self.model_type)

    def name(self, columns: Mapping[str, Any]) -> str:
        """Return the template's name for a row, or the setting where it is a text."""
        if self.template != AUTO:
            return self.template
        return auto_template(self.rewards, columns.get(METHOD) or self.method)

    def count(self, sample: Sample) -> None:
        """Count a row: a check that finds no fault. A row that is checked for each of its solutions counts once."""
        self.counts[self.name(sample.columns)] += sample.index != self.last
        self.last = sample.index

    def __str__(self) -> str:
        if self.template != AUTO:
            return f"question_template: {self.template if self.template in TEMPLATES else repr(self.template)}"
        if not self.counts:
            return f"question_template auto: {self.name({})}, or by the column {METHOD} of a row"
        if len(self.counts) == 1:
            return f"question_template auto: {next(iter(self.counts))}"
        rows = (f"{name} for {count} rows" for name, count in self.counts.most_common())
        return f"question_template auto: {', '.join(rows)}"
