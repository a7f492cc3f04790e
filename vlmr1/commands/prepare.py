"""Model, processor and rows of a training job, each checked before the next one is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import SaveStrategy

from vlmr1.data.image_limits import limit_images
from vlmr1.data.pass_rates import PassRates, within_pass_rates
from vlmr1.data.samples import Samples, validation_split
from vlmr1.distributed.ranks import Ranks
from vlmr1.errors import SettingError
from vlmr1.evaluation.run_rows import evaluation_samples
from vlmr1.evaluation.settings import EvaluationSettings
from vlmr1.lifecycle.disk import checkpoint_bytes, warn_if_low_space
from vlmr1.models import load_model, load_processor, model_type_of
from vlmr1.models.settings import ParameterSettings
from vlmr1.models.trainable import planned_model
from vlmr1.rewards.rows import RowReader
from vlmr1.tiny import DIGITS, TINY, digits, model_path
from vlmr1.types import Sample


@dataclass(frozen=True)
class Prepared:
    """Model, processor and rows of a run."""

    model: Any
    processor: Any
    train: Samples
    validation: Sequence[Sample] | None  # val_split_ratio of the rows
    evaluated: Sequence[Sample] | None  # during training
    pass_rates: PassRates | None = None  # of the rows before those out of bounds are left out


def prepare(
    config: Any, reader_of: Callable[[Any, str, Any], Any] = RowReader.of, *, finished: bool = False
) -> Prepared:
    """Model, processor and samples of a run, each row checked, by default against the rewards that will score it. A
    `finished` run saves nothing more."""
    output_dir = Path(config.output_dir or "output")
    settings = ParameterSettings.of(config)
    if not settings.model_name_or_path:
        raise SettingError(f"model_name_or_path is not set: a local directory, a hub id, or {TINY!r}")
    if not config.data_file_paths:
        raise SettingError(f"data_file_paths is not set: JSONL files, or {DIGITS!r}")
    name = model_path(settings.model_name_or_path)
    model_type = model_type_of(name, **settings.source)
    processor = load_processor(settings.adapter or name, base=name, **settings.source)
    limit_images(processor, model_type, **settings.image_limits)
    reader = reader_of(config, model_type, processor.image_processor)
    train = reader.training(*_data_files(config, output_dir))
    if config.process_index == 0 and train.tally is not None:
        print(*train.tally.lines(), sep="\n", flush=True)
    validation = None
    if config.val_split_ratio > 0:
        seed = config.seed if config.data_seed is None else config.data_seed
        train, validation = validation_split(train, config.val_split_ratio, seed)
    train, rates = within_pass_rates(train, config)
    if config.should_save and config.save_strategy != SaveStrategy.NO and not finished:
        planned = planned_model(name, settings)
        size = checkpoint_bytes(planned, settings.optimizer, weights_only=config.save_only_model)
        warn_if_low_space(output_dir, size)
    model = load_model(
        name,
        dtype=getattr(torch, settings.model_dtype),
        attn_implementation=settings.attn_implementation,
        compute_dtype=settings.compute_dtype if settings.load_in_4bit else None,
        **settings.source,
    )
    evaluated = evaluation_samples(EvaluationSettings.of(config), reader, validation)
    return Prepared(model, processor, train, validation, evaluated, rates)


def _data_files(config: Any, output_dir: Path) -> tuple[list[str], list[str]]:
    """Data files and image folders; the embedded data set is written below the output directory first."""
    if config.data_file_paths != [DIGITS]:
        return config.data_file_paths, config.image_folders
    ranks = Ranks(config.process_index, config.world_size)
    return digits.training_files(output_dir, config.seed, first=ranks.rank == 0, barrier=ranks.barrier)
