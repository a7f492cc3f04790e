"""Rows of a run, each checked against the rewards that will score it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmr1.data.samples import Samples, load_samples
from vlmr1.data.settings import DataSettings
from vlmr1.data.sources import split_names
from vlmr1.data.templates import question_text
from vlmr1.rewards.methods import columns_of_files
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

    def read(
        self,
        files: Sequence[str],
        folders: Sequence[str],
        *,
        checks: Sequence[Callable[[Sample], None]] = (),
        defaults: Sequence[Mapping[str, Any]] | None = None,
    ) -> Samples:
        """The samples of all files. `checks` come before those of the rewards; `defaults` are columns of the rows of
        each file, by default its accuracy method. Raises as `load_samples`."""
        if defaults is None:
            defaults = columns_of_files(len(split_names(files)), self.options.accu_reward_method)
        return load_samples(
            files,
            folders,
            question=question_text(self.data.question_template, self.model_type),
            check_images=self.data.check_images,
            columns=self.data.columns,
            checks=[*checks, *checks_of(self.options.reward_funcs, self.rewards)],
            defaults=defaults,
        )
