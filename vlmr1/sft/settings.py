"""Settings of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmr1.data.templates import AUTO, TEMPLATES
from vlmr1.grpo.settings import PackSettings
from vlmr1.types import Settings, setting

COMPLETION = "completion"  # TRL's column of the answer
QUESTION_TEMPLATE = setting(
    "none", f"{', '.join(TEMPLATES)}, or a text with {{question}} in it; give that of the GRPO run that follows"
)


class _OnePass(Settings):
    """Settings that passes over packs read and supervised fine-tuning does not have."""

    shared = ("full_determinism", "question_template")
    if TYPE_CHECKING:

        @property
        def question_template(self) -> str: ...

    temperature = 1.0
    updates_per_generation = num_iterations = 1
    skips_zero_advantage = mask_truncated_completions = False
    completions_to_log = 0
    beta, sync_ref_model = 0.0, False  # no reference model
    reference = reference_kind = "none"


@dataclass
class AnswerSettings(PackSettings, _OnePass):
    """The answers that are trained on."""

    group = "Answers"
    response_column: str = setting(
        "response",
        "column of the answer, or of a list of answers to one prompt; default: response or completion, else the "
        "assistant's last turn, else the solution",
    )
    max_length: int | None = setting(
        None, "limit of prompt and answer in tokens; longer answers are cut at their end, as in TRL"
    )

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """The columns of answers, in the order in which they are looked for."""
        return tuple(dict.fromkeys((self.response_column, COMPLETION)))

    def check(self) -> Iterator[str]:
        yield from self.at_least(2, "max_length")
        if self.question_template == AUTO:
            yield "question_template=auto reads rewards, which supervised fine-tuning has not: name a template"
        if not self.response_column:
            yield "response_column is empty: name a column"

    def check_device(self, device: str) -> Iterator[str]:
        return iter(())
