"""TRL's own GRPOTrainer, whole, made by its constructor: updates from given groups, and steps.

An update runs all but the rollout: the tensors that TRL would make of its completions are made here. A step is TRL's
`training_step` for each micro-batch, which draws all prompts' completions in one `generate` at the first of them, and
the optimizer. Settings that are not TRL's defaults: `loss_type="grpo"` and a KL without bias correction, as in the
other arms; gradient checkpointing as in the other arms; micro-batches of one group; `bf16` off in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import model as bench_model
from benchmarks.arms import BETA
from benchmarks.model import QUESTION, Shape
from vlmr1.models import family_of
from vlmr1.models.family import joined
from vlmr1.types import Group


class TRL:
    """The trainer, its model as `train` makes it before the first step."""

    def __init__(self, model: Any, processor: Any, folder: Path, shape: Shape, dtype: str):
        import datasets
        from PIL import Image
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        model.save_pretrained(folder / "trl")  # TRL reads its reference model from a folder
        model.config._name_or_path = str(folder / "trl")
        prompt = [{"role": "user", "content": QUESTION}]
        banned = family_of(model).placeholder_ids(model)
        size, length = shape.num_generations, shape.completion_length
        given: dict[str, Any] = {"num_generations": size, "per_device_train_batch_size": size, "loss_type": "grpo"}
        given |= {"max_completion_length": length, "gradient_accumulation_steps": shape.prompts, "beta": BETA}
        given |= {"use_bias_correction_kl": False, "gradient_checkpointing": shape.checkpointing, "report_to": "none"}
        given |= {"use_cpu": not torch.cuda.is_available(), "bf16": dtype == "bfloat16"}
        given |= {"generation_kwargs": {"min_new_tokens": length, "suppress_tokens": banned}}
        config = GRPOConfig(output_dir=str(folder / "output"), **given)
        self.trainer: Any = GRPOTrainer(
            model=model,
            reward_funcs=bench_model.rewards(shape.num_generations),  # type: ignore[arg-type]
            args=config,
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt}]),
            processing_class=processor,
        )
        self.trainer.current_gradient_accumulation_steps = shape.prompts  # the training loop sets it
        self.model, self.shape = self.trainer.model, shape
        if shape.checkpointing:
            bench_model.use_checkpointing(self.model)
        self.trainer.model_wrapped = self.trainer.accelerator.prepare_model(self.model)  # autocast, in bfloat16
        bench_model.perturb(self.trainer.ref_model)
        self.optimizer = self.trainer.create_optimizer()
        images = [
            Image.open(bench_model.image_of(folder, shape, index)).convert("RGB") for index in range(shape.prompts)
        ]
        self.rows = [{"prompt": prompt, "image": image} for image in images for _ in range(shape.num_generations)]

    def update(self, groups: Sequence[Group]) -> float:
        self.model.train()
        total = 0.0
        for group in groups:
            inputs = batch(group, self.model.config.image_token_id, self.model.device)
            inputs["ref_per_token_logps"] = self._reference(inputs)
            with self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(self.model, inputs)
            self.trainer.accelerator.backward(loss)
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def _reference(self, inputs: dict[str, Any]) -> Tensor:
        names = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
        logp, _, _ = self.trainer._get_per_token_logps_and_entropies(
            self.trainer.ref_model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            batch_size=len(inputs["prompt_ids"]),
            **{name: inputs[name] for name in names},
        )
        return logp

    def step(self) -> None:
        for _ in range(self.shape.prompts):
            self.trainer.training_step(self.model, self.rows, None)
        width = self.trainer._buffered_inputs[0]["completion_ids"].shape[1]
        if width != self.shape.completion_length:
            raise RuntimeError(f"TRL drew {width} tokens")
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)


def batch(group: Group, image_token_id: int, device: torch.device) -> dict[str, Any]:
    """Return a micro-batch as TRL makes it of one group: prompt and image G times, completions of one length."""
    assert group.advantages is not None
    size, prompt = len(group.completions), group.prompt
    prompt_ids = prompt.input_ids.repeat(size, 1)  # [G, L_p]
    completion_ids = torch.stack([completion.token_ids for completion in group.completions])  # [G, C]
    types = torch.cat([(prompt_ids == image_token_id).long(), torch.zeros_like(completion_ids)], dim=1)
    tensors = {name: torch.cat([value] * size) for name, value in joined(prompt.images).items()}
    tensors |= {"prompt_ids": prompt_ids, "prompt_mask": torch.ones_like(prompt_ids), "mm_token_type_ids": types}
    tensors |= {"completion_ids": completion_ids, "completion_mask": torch.ones_like(completion_ids)}
    tensors |= {"advantages": group.advantages, "num_items_in_batch": torch.tensor(completion_ids.numel())}
    old = [completion.logp for completion in group.completions if completion.logp is not None]
    tensors |= {"old_per_token_logps": torch.stack(old)}
    return {name: value.to(device) for name, value in tensors.items()} | {"num_images": [len(prompt.images)] * size}
