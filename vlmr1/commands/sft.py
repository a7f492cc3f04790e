"""`vlmr1 sft`: supervised fine-tuning, from settings to a trained checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from vlmr1.commands.prepare import Prepared
from vlmr1.commands.start import add_arguments, start
from vlmr1.commands.training_run import Method, train_by
from vlmr1.config import SFTConfig
from vlmr1.lifecycle.signals import StopSignals
from vlmr1.sft.evaluation import LossEvaluation
from vlmr1.sft.rows import AnswerReader
from vlmr1.sft.trainer import SFTTrainer

__all__ = ["add_arguments", "run", "sft"]


def run(options: argparse.Namespace, rest: list[str]) -> None:
    config = start(options, rest, SFTConfig)
    if config is not None:
        sft(config)


def sft(config: SFTConfig) -> SFTTrainer:
    """Run, or continue from the last complete checkpoint in the output directory. Raises Stopped where a signal ended
    the run, after a checkpoint."""
    return train_by(Method(AnswerReader.of, _trainer, _evaluation), config)


def _trainer(config: SFTConfig, prepared: Prepared, callbacks: Sequence[TrainerCallback]) -> SFTTrainer:
    return SFTTrainer(prepared.model, config, prepared.train, prepared.processor, callbacks=callbacks)


def _evaluation(trainer: Any, prepared: Prepared, stop: StopSignals) -> LossEvaluation:
    assert prepared.evaluated is not None
    return LossEvaluation(trainer, prepared.evaluated, stop=stop)
