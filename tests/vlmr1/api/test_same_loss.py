"""TRL's trainer and ours, both made by their constructors, have the same loss and gradient on the same completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

import vlmr1
from tests.helpers.families import build
from tests.helpers.slow import mostly_slow
from vlmr1.models.processor import load_processor
from vlmr1.types import Completion, Group

trl = pytest.importorskip("trl")
ENDS = (1, *range(7, 60))  # tokens that end a completion

CASES: dict[str, dict[str, Any]] = {  # settings of both trainers; `moved`: of the policy since it drew the completions
    "defaults": {},
    "second_iteration": dict(num_iterations=2, moved=1e-3),
    "reference": dict(beta=0.04, num_iterations=2, moved=3e-3),
    "reference_not_corrected": dict(beta=0.04, use_bias_correction_kl=False, num_iterations=2, moved=3e-3),
    "grpo": dict(loss_type="grpo", num_iterations=2, moved=3e-3),
    "bnpo": dict(loss_type="bnpo", num_iterations=2, moved=3e-3),
    "dr_grpo": dict(loss_type="dr_grpo", num_iterations=2, moved=3e-3),
    "sequence": dict(loss_type="grpo", importance_sampling_level="sequence", num_iterations=2, moved=3e-3, beta=0.1),
    "cispo": dict(loss_type="cispo", epsilon_high=1.1, num_iterations=2, moved=3e-3),
    "two_sided": dict(delta=1.2, epsilon=0.1, epsilon_high=0.28, num_iterations=2, moved=3e-3),
    "entropy": dict(entropy_coef=0.1),
    "temperature": dict(temperature=0.7, top_k=50, top_p=0.9),
    "truncated": dict(mask_truncated_completions=True, max_completion_length=4),
    "batch": dict(scale_rewards="batch"),
    "not_scaled": dict(scale_rewards=False),
    "apart": dict(multi_objective_aggregation="normalize_then_sum"),
    "weights": dict(reward_weights=[1.0, 0.3]),
    "several_packs": dict(tokens_per_pack=1, num_iterations=2, moved=3e-3),
    "several_packs_bnpo": dict(loss_type="bnpo", tokens_per_pack=1, num_iterations=2, moved=3e-3),
    "several_packs_dr_grpo": dict(loss_type="dr_grpo", tokens_per_pack=1, beta=0.04, num_iterations=2, moved=3e-3),
    "several_packs_truncated": dict(mask_truncated_completions=True, max_completion_length=4, tokens_per_pack=1),
    "entropy_bnpo": dict(loss_type="bnpo", entropy_coef=0.1),
}


def rows() -> Any:
    noise = np.random.default_rng(0).integers(0, 255, (3, 56, 84, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in noise]
    prompts = [[{"role": "user", "content": f"Where is {i}?"}] for i in range(3)]
    return datasets.Dataset.from_list([{"prompt": p, "image": i} for p, i in zip(prompts, images, strict=True)])


def sums(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def lengths(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids) + ids[0] % 3) for ids in completion_ids]


def trainer(module: Any, folder: Path, output: Path, settings: dict[str, Any], **given: Any) -> Any:
    known = dict(use_cpu=True, bf16=False, report_to="none", num_generations=4, per_device_train_batch_size=12)
    known |= dict(gradient_checkpointing=False, max_completion_length=12, disable_tqdm=True, shuffle_dataset=False)
    args = module.GRPOConfig(str(output), **known | settings)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = list(ENDS)
    return module.GRPOTrainer(model, [sums, lengths], args, rows(), processing_class=load_processor(folder), **given)


def theirs(trainer: Any, moved: float) -> tuple[float, dict[str, Tensor], Any]:
    """Loss and gradient of TRL, and the batch that it has drawn."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    move(trainer.model, moved)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # which the loop sets
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss), gradient(trainer.model), batch


def ours(trainer: Any, batch: Any, moved: float) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient on the completions of TRL's batch."""
    trainer.create_optimizer_and_scheduler(1)
    groups = [group_of(trainer.train_dataset[i], batch) for i in range(3)]
    trainer.prepare(trainer.model, groups)
    move(trainer.model, moved)
    loss, _ = trainer.backward(trainer.model, groups)
    return float(loss), gradient(trainer.model)


def group_of(prompt: Any, batch: Any) -> Group:
    """The group of a prompt, with TRL's completions and advantages."""
    prompts = [ids[mask.bool()] for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
    places = [i for i, ids in enumerate(prompts) if torch.equal(ids, prompt.input_ids)]
    assert len(places) == 4  # the tokens are the same
    masks = [batch["completion_mask"][i].bool() for i in places]
    completions = [batch["completion_ids"][i][: len(mask)] for i, mask in zip(places, masks, strict=True)]
    ends = [ids[mask] if mask.any() else ids for ids, mask in zip(completions, masks, strict=True)]
    made = [
        Completion(ids, None, None, "", "stop" if mask.any() and int(ids[-1]) in ENDS else "length")
        for ids, mask in zip(ends, masks, strict=True)
    ]
    return Group(prompt, tuple(made), None, batch["advantages"][places])


def move(model: Any, far: float) -> None:
    """Move every weight that is trained; the draws are the same in each model."""
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        step = far * torch.randn(parameter.shape, generator=random)
        parameter.data += step if parameter.requires_grad else 0.0


def gradient(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    norm = torch.cat([each.flatten() for each in one.values()]).norm()
    difference = torch.cat([(one[name] - other[name]).flatten() for name in one]).norm()
    assert norm > 1e-4 and difference < 1e-6 * norm


@pytest.mark.parametrize("case", mostly_slow(CASES, "defaults", "reference", "sequence", "cispo", "batch"))
def test_loss_and_gradient_are_those_of_trl(case: dict[str, Any], tmp_path: Path) -> None:
    own = {name: case[name] for name in case if name == "tokens_per_pack"}  # settings that TRL does not have
    settings, moved = {name: case[name] for name in case if name not in ("moved", *own)}, case.get("moved", 0.0)
    folder = build("qwen2_5_vl", tmp_path / "model")
    loss, expected, batch = theirs(trainer(trl, folder, tmp_path / "theirs", settings), moved)
    found, gradients = ours(trainer(vlmr1, folder, tmp_path / "ours", settings | own), batch, moved)
    assert found == pytest.approx(loss, abs=1e-6)
    assert_same(expected, gradients)
