"""`vlmr1 train`: GRPO, from settings to a trained checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from vlmr1.commands.prepare import Prepared
from vlmr1.commands.start import add_arguments, start
from vlmr1.commands.training_run import Method, train_by
from vlmr1.config import GRPOConfig
from vlmr1.evaluation.callback import EvaluationCallback
from vlmr1.grpo.no_signal_warning import NoSignalWarning
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.lifecycle.signals import StopSignals
from vlmr1.rewards.rows import RowReader

__all__ = ["add_arguments", "run", "train"]


def run(options: argparse.Namespace, rest: list[str]) -> None:
    config = start(options, rest)
    if config is not None:
        train(config)


def train(config: GRPOConfig) -> GRPOTrainer:
    """Run, or continue from the last complete checkpoint in the output directory. Raises Stopped where a signal ended
    the run, after a checkpoint."""
    return train_by(Method(RowReader.of, _trainer, _evaluation), config)


def _trainer(config: GRPOConfig, prepared: Prepared, callbacks: Sequence[TrainerCallback]) -> GRPOTrainer:
    progress, *others = callbacks
    callbacks = [progress, NoSignalWarning(), *others]
    return GRPOTrainer(prepared.model, config, prepared.train, prepared.processor, callbacks=callbacks)


def _evaluation(trainer: Any, prepared: Prepared, stop: StopSignals) -> EvaluationCallback:
    boxes = trainer.args.box_coordinates
    assert prepared.evaluated is not None
    return EvaluationCallback(trainer, prepared.evaluated, box_coordinates=boxes, stop=stop)
