"""One training job, from settings to a trained checkpoint; settings and files are checked first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from vlmr1.commands.finish import finish
from vlmr1.commands.prepare import Prepared, prepare
from vlmr1.commands.schedule import describe_schedule
from vlmr1.distributed.launch import launch_name
from vlmr1.distributed.preflight import check_scale
from vlmr1.distributed.ranks import Ranks
from vlmr1.lifecycle.checkpoint import remove_staging
from vlmr1.lifecycle.disk import check_output_dir
from vlmr1.lifecycle.processes import translate_worker_death
from vlmr1.lifecycle.resume import ResumeGuard, check_resumable, find_checkpoint, is_final
from vlmr1.lifecycle.run_settings import check_settings, keep_settings
from vlmr1.lifecycle.signals import StopSignals
from vlmr1.report.progress import Progress


@dataclass(frozen=True)
class Method:
    """Makers of the parts that depend on the method: the reader of rows, the trainer, the callback that evaluates."""

    reader: Callable[..., Any]
    trainer: Callable[[Any, Prepared, Sequence[TrainerCallback]], Any]
    evaluation: Callable[[Any, Prepared, StopSignals], TrainerCallback]


def train_by(method: Method, config: Any) -> Any:
    """Run, or continue from the last complete checkpoint in the output directory; return the trainer. Raises Stopped
    where a signal ended the run, after a checkpoint."""
    with StopSignals() as stop, translate_worker_death(), ResumeGuard() as resuming:
        return _train(method, config, stop, resuming)


def _train(method: Method, config: Any, stop: StopSignals, resuming: ResumeGuard) -> Any:
    output_dir = Path(config.output_dir or "output")
    ranks = Ranks(config.process_index, config.world_size)
    config.check_device()
    if ranks.rank == 0:
        check_output_dir(output_dir)
    resume = resuming.checkpoint = find_checkpoint(output_dir, config.resume_from_checkpoint)
    check_scale(config)
    spread = {"processes": config.world_size, "launch": launch_name(), "command": config.command}
    check_settings(config, spread, resume)
    if resume is not None:
        check_resumable(resume)
    if ranks.rank == 0:
        remove_staging(output_dir)
    prepared = prepare(config, method.reader, finished=resume is not None and is_final(resume))
    ranks.barrier()  # for all to have looked, before one writes
    if ranks.rank == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        keep_settings(config, spread, output_dir)
    ranks.barrier()
    progress = Progress(output_dir, console=not config.disable_tqdm, pass_rates=prepared.pass_rates)
    trainer = method.trainer(config, prepared, [progress, stop, resuming])
    progress.trainer = trainer
    if prepared.evaluated is not None:
        trainer.add_callback(method.evaluation(trainer, prepared, stop))
    say = print if ranks.rank == 0 else lambda *words, **options: None
    rows = len(trainer.train_dataset) if has_length(trainer.train_dataset) else None
    say(describe_schedule(config, rows), flush=True)
    say(*prepared.train.describe(), sep="\n", flush=True)
    if resume is not None and trainer.is_finished(resume):
        say(f"{resume}: all {trainer.state.max_steps} updates are done", flush=True)
        finish(trainer, resume)
        return trainer
    if resume is not None:
        say(f"continuing from {resume}", flush=True)
    with progress:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    stop.raise_if_stopped()
    best = trainer.state.best_model_checkpoint
    if best is not None:
        say(f"best       {best}: {config.metric_for_best_model} {trainer.state.best_metric:.4f}", flush=True)
    finish(trainer)
    return trainer
