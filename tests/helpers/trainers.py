"""Trainers of the tiny model, and the gradients of one backward pass."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import vlmr1_kernels
from tests.helpers.maker import Maker
from tests.helpers.updates import update
from vlmr1.config import GRPOConfig
from vlmr1.data.samples import load_samples
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.report.progress import COMPLETIONS, Progress, read_lines
from vlmr1.tiny import digits


def trainer_of(model: Any, processor: Any, output: Path, **settings: Any) -> GRPOTrainer:
    given = {"num_generations": 3, "prompts_per_device": 2, "max_completion_length": 8, "max_steps": 1}
    given |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3} | settings
    folder = output / "data"
    path = folder / "train.jsonl"
    if not path.exists():
        digits.write(folder, "train", 4, seed=5)
    samples = load_samples([path], [folder / "images"], question="{question}", check_images=False)
    config = GRPOConfig(output_dir=str(output), **given)
    return GRPOTrainer(copy.deepcopy(model), config, samples, processor, reward_funcs=[position, even])


def position(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [float(i % 3) for i in range(len(completions))]


def even(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [10.0 * (i % 2) for i in range(len(completions))]


def gradients(trainer: GRPOTrainer, make: Maker) -> tuple[float, dict[str, torch.Tensor]]:
    """One backward over two fixed groups."""
    groups = make.groups(("Locate the digit 7.", (84,), (5, 9, 3)), ("Locate the digit 3.", (112,), (4, 2, 6)))
    with vlmr1_kernels.use(trainer.args.kernels):
        loss, _, found = update(trainer, groups)
    return loss, found


def relative(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    flat = [torch.cat([each[name].flatten() for name in one]) for each in (one, other)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def recorded(trainer: GRPOTrainer, output: Path) -> list[dict[str, Any]]:
    """Train; return the completions that are recorded in `output`."""
    progress = Progress(output, console=False)
    progress.trainer = trainer
    trainer.add_callback(progress)
    trainer.train()
    return read_lines(output / COMPLETIONS)


def shift(trainer: GRPOTrainer, by: float) -> None:
    """Let the engine report log-probs that are too low by this."""
    drawn = trainer.rollout
    trainer.rollout = lambda prompts: [
        replace(group, completions=tuple(replace(c, logp=c.logp - by) for c in group.completions))
        for group in drawn(prompts)
    ]
