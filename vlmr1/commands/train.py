"""One training job, from settings to a trained checkpoint; everything that can be known is checked first."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from vlmr1.config import GRPOConfig
from vlmr1.data.samples import load_samples, validation_split
from vlmr1.data.sources import split_names
from vlmr1.data.templates import question_text
from vlmr1.distributed.launch import launched_as
from vlmr1.distributed.preflight import check_scale
from vlmr1.distributed.ranks import Ranks
from vlmr1.errors import OutputError, SettingError
from vlmr1.evaluation.callback import EvaluationCallback
from vlmr1.evaluation.run_rows import evaluation_samples
from vlmr1.grpo.buffer import BufferSampler
from vlmr1.grpo.no_signal_warning import FlatRewards
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.lifecycle.checkpoint import clean, fault_of, last_complete, replace_text
from vlmr1.lifecycle.console import surviving
from vlmr1.lifecycle.disk import check_output_dir, checkpoint_bytes, warn_of_space, writing
from vlmr1.lifecycle.processes import naming_lost_workers
from vlmr1.lifecycle.resume import Resuming, check_resumable, is_last
from vlmr1.lifecycle.signals import StopSignals
from vlmr1.models import load_model, load_processor, model_type_of
from vlmr1.models.image_limits import limit_images
from vlmr1.models.lora import is_adapter
from vlmr1.models.quantization import compute_dtype
from vlmr1.models.trainable import planned_model
from vlmr1.report.progress import Progress
from vlmr1.report.training import NAME as REPORT
from vlmr1.report.training import write_run_report
from vlmr1.rewards.methods import columns_of_files
from vlmr1.rewards.registry import checks_of
from vlmr1.tiny import CHECKPOINT, digits
from vlmr1.types import Sample

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"
TINY, DIGITS = "tiny", "digits"  # the names of the embedded model and data set
TRAIN_ROWS = 4000  # of the embedded data set
# Settings that a resumed run may change: none of them has a part in what is computed.
CHANGEABLE = {
    "output_dir",
    "resume_from_checkpoint",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "logging_steps",
    "log_completions",
    "memory_by_phase",
    "write_report",
    "log_level",
    "rollout_logp_alarm",
    "disable_tqdm",
    "report_to",
    "run_name",
    "check_images",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "ddp_timeout",
    "local_rank",
    "eval_steps",
    "eval_on_start",
    "eval_limit",
    "eval_data_file_paths",
    "eval_image_folders",
}


@dataclass(frozen=True)
class Prepared:
    """What a run starts from."""

    model: Any
    processor: Any
    train: Sequence[Sample]
    validation: Sequence[Sample] | None  # val_split_ratio of the rows


def prepare(config: GRPOConfig, *, finished: bool = False) -> Prepared:
    """Model, processor and samples of a run, each row checked against the rewards that will score it. `finished`: it
    will save nothing any more."""
    output_dir = Path(config.output_dir or "output")
    if not config.model_name_or_path:
        raise SettingError(f"model_name_or_path is not set: a local directory, a hub id, or {TINY!r}")
    if not config.data_file_paths:
        raise SettingError(f"data_file_paths is not set: JSONL files, or {DIGITS!r}")
    name = model_path(config.model_name_or_path)
    if is_adapter(name):
        raise SettingError(f"model_name_or_path: {name} holds an adapter only; `vlmr1 merge` makes a model of it")
    options = {"revision": config.model_revision, "trust_remote_code": config.trust_remote_code}
    model_type = model_type_of(name, **options)
    processor = load_processor(name, **options)
    limits = {name: getattr(config, name) for name in ("min_pixels", "max_pixels", "max_anyres_num")}
    limit_images(processor, model_type, **limits)
    rewards = config.rewards().with_boxes(config.box_coordinates, model_type, processor.image_processor)
    files, folders = data_of(config, output_dir)
    train: Sequence[Sample] = load_samples(
        files,
        folders,
        question=question_text(config.question_template, model_type),
        check_images=config.check_images,
        prompt_column=config.prompt_column,
        solution_column=config.solution_column,
        checks=checks_of(config.reward_funcs, rewards),
        defaults=columns_of_files(len(split_names(files)), config.accu_reward_method),
    )
    validation = None
    if config.val_split_ratio > 0:
        seed = config.seed if config.data_seed is None else config.data_seed
        train, validation = validation_split(train, config.val_split_ratio, seed)
    if config.should_save and config.save_strategy != SaveStrategy.NO and not finished:
        optim = str(getattr(config.optim, "value", config.optim))
        size = checkpoint_bytes(planned_model(name, config), optim, weights_only=config.save_only_model)
        warn_of_space(output_dir, size)
    model = load_model(
        name,
        dtype=getattr(torch, config.model_dtype),
        attn_implementation=config.attn_implementation,
        compute_dtype=compute_dtype(config) if config.load_in_4bit else None,
        **options,
    )
    return Prepared(model, processor, train, validation)


def model_path(name: str) -> str:
    """The embedded model's directory for its name; any other name as it is."""
    return str(CHECKPOINT) if name == TINY else name


def data_of(config: GRPOConfig, output_dir: Path) -> tuple[list[str], list[str]]:
    """Data files and image folders; the embedded data set is written below the output directory first."""
    if config.data_file_paths != [DIGITS]:
        return config.data_file_paths, config.image_folders
    folder = output_dir / "data"
    path = folder / "train.jsonl"
    if config.process_index == 0 and not path.exists():
        with writing("the embedded data set", output_dir):
            digits.write(folder, "train", count=TRAIN_ROWS, seed=config.seed)
    ranks_of(config).barrier()
    return [str(path)], [str(folder / "images")]


def train(config: GRPOConfig) -> GRPOTrainer:
    """Run, or continue from the last complete checkpoint in the output directory. Raises Stopped where a signal ended
    the run, after a checkpoint."""
    with StopSignals() as stop, naming_lost_workers(), Resuming() as resuming:
        return _train(config, stop, resuming)


def _train(config: GRPOConfig, stop: StopSignals, resuming: Resuming) -> GRPOTrainer:
    output_dir = Path(config.output_dir or "output")
    ranks = ranks_of(config)
    if ranks.rank == 0:
        check_output_dir(output_dir)
    resume = resuming.checkpoint = find_resume(config, output_dir)
    check_scale(config)
    check_settings(config, resume)
    if resume is not None:
        check_resumable(resume)
    if ranks.rank == 0:
        clean(output_dir)
    prepared = prepare(config, finished=resume is not None and is_last(resume))
    evaluated = evaluation_samples(config, prepared.model.config.model_type, prepared.processor, prepared.validation)
    ranks.barrier()  # for all to have looked, before one writes
    if ranks.rank == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        keep_settings(config, output_dir)
    ranks.barrier()
    progress = Progress(output_dir, console=not config.disable_tqdm)
    callbacks = [progress, FlatRewards(), stop, resuming]
    trainer = GRPOTrainer(prepared.model, config, prepared.train, prepared.processor, callbacks=callbacks)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    progress.trainer = trainer
    if evaluated is not None:
        trainer.add_callback(EvaluationCallback(trainer, evaluated, box_coordinates=config.box_coordinates, stop=stop))
    say = print if ranks.rank == 0 else lambda *words, **options: None
    say(arithmetic(config, len(trainer.train_dataset)), flush=True)  # type: ignore[arg-type]
    if resume is not None and trainer.is_finished(resume):
        say(f"{resume}: all {trainer.state.max_steps} updates are done", flush=True)
        return trainer
    if resume is not None:
        say(f"continuing from {resume}", flush=True)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    stop.leave()
    if config.write_report and trainer.is_world_process_zero():
        report_of_run(output_dir)
    return trainer


def report_of_run(output_dir: Path) -> None:
    """The page of a run that is done; a disk that has no room for it is no failure of the run."""
    try:
        with writing(REPORT, output_dir):
            path = write_run_report(output_dir)
    except OutputError as error:
        logger.warning("%s", error)
        return
    with surviving():
        print(f"report     {path}", flush=True)


def find_resume(config: GRPOConfig, output_dir: Path) -> Path | None:
    """The checkpoint to continue from: the one that is named, or the last complete one of the output directory."""
    if config.resume_from_checkpoint is None:
        return last_complete(output_dir)
    named = Path(config.resume_from_checkpoint)
    fault = fault_of(named)
    if fault:
        raise SettingError(f"resume_from_checkpoint: {named} is not a complete checkpoint: {fault}")
    return named


def settings_of(config: GRPOConfig) -> dict[str, Any]:
    """All settings, and how the run is spread over processes."""
    now = json.loads(config.to_json_string())
    return {field.name: now.get(field.name) for field in fields(config)} | {
        "processes": config.world_size,
        "launch": launched_as(),
    }


def check_settings(config: GRPOConfig, resume: Path | None) -> None:
    """A run that goes on from a checkpoint must have the same settings as the run that wrote it, where they matter. One
    that it did not know yet had its default."""
    now = settings_of(config)
    written = resume.parent / SETTINGS if resume is not None else None
    if written is not None and written.exists():
        defaults = {each.name: _default(each) for each in fields(config)} | {"processes": 1, "launch": "ddp"}
        before = defaults | read_settings(written)
        changed = [name for name in now if name not in CHANGEABLE and before[name] != now[name]]
        if changed:
            name = changed[0]
            raise SettingError(
                f"{name} is {now[name]!r}, but the run in {written.parent} was started with {before[name]!r}: "
                "give another output_dir, or the same settings"
            )


def keep_settings(config: GRPOConfig, output_dir: Path) -> None:
    """Write the settings beside the checkpoints."""
    with writing(SETTINGS, output_dir):
        replace_text(output_dir / SETTINGS, json.dumps(settings_of(config), indent=1))


def ranks_of(config: GRPOConfig) -> Ranks:
    return Ranks(config.process_index, config.world_size)


def _default(setting: Field) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a run has written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingError(f"{path} cannot be read ({error}): without it, settings are not compared") from error


def arithmetic(config: GRPOConfig, rows: int) -> str:
    """Prompts, generations, sequences and updates, over all ranks, in words."""
    ranks = config.world_size
    prompts = config.prompts_per_device * ranks
    repeats = config.steps_per_generation * config.num_iterations
    counted = BufferSampler(
        range(rows),  # type: ignore[arg-type]
        prompts=config.prompts_per_device,
        parts=config.steps_per_generation,
        iterations=config.num_iterations,
        drop_last=config.dataloader_drop_last,
        ranks=ranks_of(config),
    )
    epoch = max(1, len(counted))
    updates = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * epoch)
    return (
        f"{rows} rows; an update: {prompts} prompts x {config.num_generations} generations = "
        f"{prompts * config.num_generations} sequences on {ranks} device{'s' if ranks > 1 else ''}; "
        f"{'' if repeats == 1 else f'a generation serves {repeats} updates; '}"
        f"{epoch} updates an epoch, {updates} in all ({updates / epoch:.1f} epochs)"
    )
