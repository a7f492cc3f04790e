"""Rows of a run of supervised fine-tuning, each checked before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmr1.data.formats import Columns
from vlmr1.data.media import check_tokens
from vlmr1.data.messages import message
from vlmr1.data.mixture import EVERYTHING, Mixture
from vlmr1.data.samples import Samples, load_samples
from vlmr1.data.settings import DataSettings
from vlmr1.data.stream import stream_samples
from vlmr1.rewards.question import Question
from vlmr1.types import Sample


@dataclass(frozen=True)
class AnswerReader:
    """Reads data files as the settings of a run say; the solutions of its samples are the answers to train on."""

    data: DataSettings
    columns: Columns
    question: Question

    @classmethod
    def of(cls, config: Any, model_type: str, image_processor: Any) -> AnswerReader:
        data = DataSettings.of(config)
        columns = replace(data.columns, answers=config.answer_columns)
        return cls(data, columns, Question(data.question_template, (), "", model_type))

    @property
    def options(self) -> dict[str, Any]:
        return {"question": self.question, "columns": self.columns, "checks": [check_answer]}

    def training(self, files: Sequence[str], folders: Sequence[str]) -> Samples:
        """The samples that a run trains on: those that its settings take of the files, or a stream of them."""
        if not self.data.streaming:
            return self.read(files, folders, mixture=self.data.mixture)
        return stream_samples(files, folders, self.data.mixture, **self.options)

    def read(self, files: Sequence[str], folders: Sequence[str], *, mixture: Mixture = EVERYTHING) -> Samples:
        """The samples of all files. Raises as `load_samples`."""
        return load_samples(files, folders, check_images=self.data.check_images, mixture=mixture, **self.options)


def check_answer(sample: Sample) -> None:
    """DataError for an answer that holds a model's token of an image or a video."""
    check_tokens([message("assistant", [{"type": "text", "text": sample.solution}])], sample.source, "the answer")
