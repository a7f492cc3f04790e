"""Trainers with LoRA whose adapters have learned something, and one update of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tests.helpers.updates import update
from vlmr1.config import GRPOConfig
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.types import Group

LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}


def perturb(model: Any, scale: float = 0.1) -> None:
    """Adapters begin as nothing, with half of their gradients zero; these have learned something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def trainer_of(model: Any, processor: Any, output: Path, **settings: Any) -> GRPOTrainer:
    config = GRPOConfig(output_dir=str(output), use_cpu=True, num_generations=2, max_completion_length=12, **settings)
    trainer = GRPOTrainer(copy.deepcopy(model), config, [], processor, reward_funcs=["format"])
    perturb(trainer.model)
    return trainer


def step(trainer: GRPOTrainer, groups: list[Group]) -> tuple[float, dict, dict]:
    """Loss, metrics and gradients by name of one update."""
    loss, metrics = update(trainer, groups)
    return float(loss), metrics, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
