"""The rows that a run evaluates, each checked before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmr1.data.samples import Samples
from vlmr1.data.sources import split_names
from vlmr1.errors import DataError, SettingError
from vlmr1.evaluation.detection import check_detection
from vlmr1.evaluation.settings import EvaluationSettings
from vlmr1.rewards.methods import METHOD, method_of
from vlmr1.rewards.registry import get_reward
from vlmr1.rewards.rows import RowReader
from vlmr1.rewards.settings import RewardSettings
from vlmr1.types import Sample

OF_BOXES = ("map", "od_ap", "od_ap50", "odLength", "weighted_sum")


def evaluation_samples(
    settings: EvaluationSettings, reader: Any, validation: Sequence[Sample] | None = None
) -> Sequence[Sample] | None:
    """The rows that a run evaluates: those of `eval_data_file_paths`, else `validation`, the part of the data that was
    kept from training. None where the settings ask for no evaluation.

    Each row is checked by the reader; with rewards, against the box metrics where it has them."""
    if settings.eval_steps is None and not settings.eval_on_start:
        return None
    if settings.eval_data_file_paths:
        samples: Sequence[Sample] = _read(settings, reader)
    elif validation is not None:
        samples = validation
    else:
        name = "eval_on_start" if settings.eval_steps is None else "eval_steps"
        raise SettingError(f"{name} needs data to evaluate on: set eval_data_file_paths, or val_split_ratio")
    if settings.eval_limit is not None:
        samples = _first(samples, settings.eval_limit)
    if isinstance(reader, RowReader) and any(
        get_reward(each, reader.rewards).name == "accuracy" for each in reader.options.reward_funcs
    ):
        _check_boxes(samples, reader.rewards)
    return samples


def _read(settings: EvaluationSettings, reader: Any) -> Samples:
    """The rows of `eval_data_file_paths`. Several accuracy methods that are not one for each of these files belong to
    the training files: then each row needs its own."""
    files, folders = settings.eval_data_file_paths, settings.eval_image_folders
    if not isinstance(reader, RowReader):
        return reader.read(files, folders)
    methods, count = len(reader.options.accu_reward_method), len(split_names(files))
    if methods in (1, count):
        return reader.read(files, folders)
    return reader.read(files, folders, checks=[_OwnMethod(methods, count)], defaults=[])


def kind_of_boxes(samples: Sequence[Sample], settings: RewardSettings) -> str | None:
    """rec or ovd, where the accuracy method of every row is of that kind and every row has one image and one solution.

    Else None, as with reward_mode vlm_r1, whose code has solutions that these metrics cannot read."""
    if settings.mode != "strict":
        return None
    kinds: set[str | None] = set()
    for sample in samples:
        single = len(sample.images) == 1 and not sample.other_solutions
        kinds.add(_kind(sample, settings) if single else None)
        if len(kinds) > 1 or None in kinds:
            return None
    return kinds.pop() if kinds else None


def _kind(sample: Sample, settings: RewardSettings) -> str | None:
    method = method_of(sample, settings)
    return "rec" if method == "iou" else "ovd" if method in OF_BOXES else None


def _check_boxes(samples: Sequence[Sample], settings: RewardSettings) -> None:
    """DataError for the first row that the metrics of detection cannot score, where there will be some."""
    fault = None
    for sample in samples:  # each is read once here
        if settings.mode != "strict" or len(sample.images) != 1 or _kind(sample, settings) != "ovd":
            return
        try:
            check_detection(sample)
        except DataError as error:
            fault = fault or error
    if fault is not None:
        raise fault


class _OwnMethod:
    """Check of rows that no method of the settings is for."""

    def __init__(self, methods: int, files: int):
        self.counts = f"accu_reward_method has {methods} methods, eval_data_file_paths {files} file{'s'[: files > 1]}"

    def __call__(self, sample: Sample) -> None:
        if sample.columns.get(METHOD) is None:
            raise SettingError(
                f"{self.counts}, and {sample.source} has no column {METHOD}: give eval_data_file_paths one file for "
                "each method, or its rows that column"
            )


def _first(samples: Sequence[Sample], count: int) -> Sequence[Sample]:
    """The first samples, read when they are asked for where these are."""
    return samples.select(samples.indices[:count]) if isinstance(samples, Samples) else samples[:count]
