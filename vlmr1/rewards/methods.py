"""Which accuracy method a row has: its own, or that of its data file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlmr1.errors import SettingError
from vlmr1.rewards.score import METHOD
from vlmr1.types import Sample


def with_methods(
    samples: Sequence[Sample], data_file_paths: Sequence[str | Path], methods: Sequence[str]
) -> list[Sample]:
    """The samples, each with a column `accu_reward_method`: the row's own where it has one, else that of its file.

    One method serves all files, or there is one for each. Raises SettingError for another number of methods, or for a
    file that is named twice with two methods.
    """
    if len(methods) not in (1, len(data_file_paths)):
        raise SettingError(
            f"accu_reward_method has {len(methods)} methods for {len(data_file_paths)} data files: "
            "give one for all, or one for each"
        )
    methods = [*methods] * (len(data_file_paths) if len(methods) == 1 else 1)
    by_file: dict[str, str] = {}
    for file, method in zip(data_file_paths, methods, strict=True):
        if by_file.setdefault(str(file), method) != method:
            raise SettingError(f"accu_reward_method: {file} is named twice, with {by_file[str(file)]!r} and {method!r}")
    return [
        replace(sample, columns={METHOD: by_file[sample.source.rpartition(":")[0]], **_own(sample)})
        for sample in samples
    ]


def _own(sample: Sample) -> dict:
    """The row's columns, without a method that is null."""
    return {name: value for name, value in sample.columns.items() if name != METHOD or value is not None}
