"""TRL's own GRPOTrainer at the benchmark's shape: its log-prob pass of the reference, its loss, its backward.

The trainer is TRL's, whole, made by its constructor; nothing of it is replaced. What is not run is
`_generate_and_score_completions` but for its reference pass: completions and advantages are given, and the
tensors that it would make of them are made here. Old log-probs are given, as they are to the other arms.
Two of TRL's defaults are off: gradient checkpointing, which costs time, and the bias correction of the KL,
which is another loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks import model as bench_model
from vlmr1.models.adapter import joined
from vlmr1.types import Group


class TRLArm:
    """One update of TRL's trainer: `prepare`, then the seconds-worthy `update`."""

    def __init__(self, model: Any, processor: Any, groups: Sequence[Group], beta: float, output: Path):
        import datasets
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        config = GRPOConfig(
            output_dir=str(output),
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=len(groups[0].completions),
            gradient_accumulation_steps=len(groups),
            num_generations=len(groups[0].completions),
            max_completion_length=len(groups[0].completions[0].token_ids),
            beta=beta,
            loss_type="grpo",
            use_bias_correction_kl=False,
            report_to="none",
        )
        prompt = [{"role": "user", "content": "never read"}]
        self.trainer: Any = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt}]),
            processing_class=processor,
        )
        self.model = self.trainer.model
        bench_model.perturb(self.trainer.ref_model)
        self.trainer.current_gradient_accumulation_steps = len(groups)  # the training loop sets it
        self.inputs = [batch(group, model.config.image_token_id) for group in groups]

    def update(self) -> Tensor:
        """Reference forward, policy forward, loss and backward of every micro-batch; the loss."""
        self.model.train()
        batches = [inputs | {"ref_per_token_logps": self._reference(inputs)} for inputs in self.inputs]
        total = torch.zeros(())
        for inputs in batches:
            with self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(self.model, inputs)
            self.trainer.accelerator.backward(loss)
            total += loss.detach()
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


class TRLStep:
    """Whole steps of TRL's trainer: its own generation, rewards, reference pass, loss, backward, optimizer."""

    def __init__(self, folder: Path, prompts: int, beta: float, reward: Any):
        import datasets
        from PIL import Image
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        shape = bench_model.BENCH
        config = GRPOConfig(
            output_dir=str(folder / "output" / "trl"),
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=shape.num_generations,
            gradient_accumulation_steps=prompts,
            num_generations=shape.num_generations,
            max_completion_length=shape.completion_length,
            generation_kwargs={"min_new_tokens": shape.completion_length},
            beta=beta,
            loss_type="grpo",
            use_bias_correction_kl=False,
            report_to="none",
        )
        model, processor = bench_model.read(folder)
        prompt = [{"role": "user", "content": "Locate the digit 7"}]
        self.trainer: Any = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=config,
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt}]),
            processing_class=processor,
        )
        self.model = self.trainer.model
        self.optimizer = self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = prompts  # the training loop sets it
        paths = [bench_model.image_of(folder, shape, index) for index in range(prompts)]
        rows = [{"prompt": prompt, "image": Image.open(path).convert("RGB")} for path in paths]
        self.groups = [[row] * shape.num_generations for row in rows]

    def run(self) -> None:
        """One step."""
        self.model.train()
        for rows in self.groups:
            inputs = self.trainer._generate_and_score_completions(rows)
            width = inputs["completion_ids"].shape[1]
            if width != bench_model.BENCH.completion_length:
                raise RuntimeError(f"TRL drew {width} tokens")
            with self.trainer.compute_loss_context_manager():
                loss = self.trainer.compute_loss(self.model, inputs)
            self.trainer.accelerator.backward(loss)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)


def batch(group: Group, image_token_id: int) -> dict[str, Any]:
    """A micro-batch as TRL makes it of one group: the prompt and its image G times, completions padded."""
    assert group.advantages is not None
    size, prompt = len(group.completions), group.prompt
    prompt_ids = prompt.input_ids.repeat(size, 1)  # [G, L_p]
    ids = [completion.token_ids for completion in group.completions]
    completion_ids = pad_sequence(ids, batch_first=True)  # [G, C]
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    images = {name: torch.cat([value] * size) for name, value in joined(prompt.images).items()}
    types = torch.cat([(prompt_ids == image_token_id).long(), torch.zeros_like(completion_ids)], dim=1)
    old = [completion.logp for completion in group.completions if completion.logp is not None]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": mask,
        "advantages": group.advantages,
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": pad_sequence(old, batch_first=True),
        "num_images": [len(prompt.images)] * size,
        "mm_token_type_ids": types,
    } | images
