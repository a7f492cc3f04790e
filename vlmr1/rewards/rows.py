"""Rows of a run, each checked against the rewards that will score it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmr1.data.mixture import EVERYTHING, Mixture
from vlmr1.data.samples import Samples, load_samples
from vlmr1.data.settings import DataSettings
from vlmr1.data.sources import split_names
from vlmr1.data.stream import stream_samples
from vlmr1.rewards.methods import columns_of_files
from vlmr1.rewards.question import Question
from vlmr1.rewards.registry import checks_of
from vlmr1.rewards.settings import RewardOptions, RewardSettings
from vlmr1.types import Sample


@dataclass(frozen=True)
class RowReader:
    """Reads data files as the settings of a run say. `rewards` have the coordinates of the model's boxes."""

    data: DataSettings
    options: RewardOptions
    rewards: RewardSettings
    model_type: str

    @classmethod
    def of(cls, config: Any, model_type: str, image_processor: Any) -> RowReader:
        """The reader of a run; SettingError where the model cannot have the setting `box_coordinates`."""
        options = RewardOptions.of(config)
        rewards = options.rewards().with_boxes(options.box_coordinates, model_type, image_processor)
        return cls(DataSettings.of(config), options, rewards, model_type)

    def training(self, files: Sequence[str], folders: Sequence[str]) -> Samples:
        """The samples that a run trains on: those that its settings take of the files, or a stream of them."""
        if not self.data.streaming:
            return self.read(files, folders, mixture=self.data.mixture)
        return stream_samples(
            files,
            folders,
            self.data.mixture,
            question=self.question(),
            columns=self.data.columns,
            defaults=columns_of_files(len(split_names(files)), self.options.accu_reward_method),
            checks=checks_of(self.options.reward_funcs, self.rewards),
        )

    def read(
        self,
        files: Sequence[str],
        folders: Sequence[str],
        *,
        checks: Sequence[Callable[[Sample], None]] = (),
        defaults: Sequence[Mapping[str, Any]] | None = None,
        mixture: Mixture = EVERYTHING,
    ) -> Samples:
        """The samples of all files. `checks` come before those of the rewards; `defaults` are columns of the rows of
        each file, by default its accuracy method. Raises as `load_samples`."""
        if defaults is None:
            defaults = columns_of_files(len(split_names(files)), self.options.accu_reward_method)
        question = self.question()
        return load_samples(
            files,
            folders,
            question=question,
            check_images=self.data.check_images,
            columns=self.data.columns,
            checks=[question.count, *checks, *checks_of(self.options.reward_funcs, self.rewards)],
            defaults=defaults,
            mixture=mixture,
        )

    def question(self) -> Question:
        """The question templates of a run's rows."""
        options, template = self.options, self.data.question_template
        return Question(template, options.reward_funcs, options.accu_reward_method[0], self.model_type)
