"""Trainers with LoRA whose adapters have learned something."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.helpers.maker import Maker
from vlmr1.config import GRPOConfig
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.models import family_of
from vlmr1.rollout import NativeEngine, SamplingSettings, TransformersEngine

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


def assert_rollouts_are_adapted(make: Maker, model: Any, processor: Any, trainer: GRPOTrainer, images: tuple) -> None:
    """Greedy, the engine gives the tokens of `generate` with the adapter, which are not those of `model`, the base;
    and the policy's log-probs."""
    prompts = [make.prompt("Locate the digit 7.", images), make.prompt("What is seven?")]
    family, settings = family_of(model), SamplingSettings(12, greedy=True)

    def tokens(engine: type, of: Any) -> list[list[int]]:
        groups = engine(of, family, processor.tokenizer).generate(prompts, 2, settings)
        return [completion.token_ids.tolist() for group in groups for completion in group.completions]

    found = tokens(NativeEngine, trainer.policy.model)
    assert found == tokens(TransformersEngine, trainer.policy.model) and found != tokens(NativeEngine, model)
    groups = trainer.rollout(prompts)
    drawn = torch.cat([completion.logp for group in groups for completion in group.completions])
    pack = make_pack([replace(group, advantages=torch.zeros(2)) for group in groups])
    torch.testing.assert_close(trainer.policy.logprobs(pack), drawn, rtol=1e-4, atol=1e-4)
