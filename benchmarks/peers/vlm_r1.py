"""VLM-R1's training step, written anew from its published source: the same work in the same order.

By `VLMGRPOTrainer` of github.com/om-ai-lab/VLM-R1 at 0ae0aea: a group is G rows of one micro-batch, and the processor
sees prompt and image G times; one `generate` a micro-batch, with a KV cache; log-probs are a log-softmax in the dtype
of the logits and a gather, row by row, over the logits of every position; a reference pass like it on a frozen copy;
advantages are rewards less their group's mean over its standard deviation + 1e-4; the loss is the clipped ratio and the
k3 estimate of the KL, mean over a sequence's tokens, mean over sequences.

In its favour: no ZeRO, no metrics, no search for a stop token, gradient checkpointing only where the other arms have
it, `top_k` off (published: 50), `generate` in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks import model as bench_model
from benchmarks.arms import BETA
from benchmarks.model import Shape
from vlmr1.models import family_of
from vlmr1.models.family import joined
from vlmr1.types import Group

EPSILON, ADVANTAGE_EPSILON, LEARNING_RATE = 0.2, 1e-4, 1e-6


class VLMR1:
    """Policy, reference and optimizer, updates from given groups, and steps."""

    def __init__(self, model: Any, processor: Any, folder: Path, shape: Shape, dtype: str):
        from transformers import GenerationConfig

        self.model, self.processor, self.shape, self.dtype = model, processor, shape, dtype
        self.reference = deepcopy(model).eval().requires_grad_(False)
        bench_model.perturb(self.reference)
        if shape.checkpointing:
            bench_model.use_checkpointing(model, use_reentrant=True)
            model.enable_input_require_grads()
        self.generation = GenerationConfig(
            max_new_tokens=shape.completion_length,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=processor.tokenizer.pad_token_id,
            suppress_tokens=family_of(model).placeholder_ids(model),
        )
        self.reward = bench_model.rewards(shape.num_generations)
        self.samples = [bench_model.sample_of(folder, shape, index) for index in range(shape.prompts)]
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def update(self, groups: Sequence[Group]) -> float:
        self.model.train()
        return sum(self._backward(*given(group, self.model.device), len(groups)) for group in groups)

    def step(self) -> None:
        for sample in self.samples:
            ids, width, images = self.rollout(self.inputs(sample))
            self._backward(ids, width, images, self.advantages(ids[:, width:]), None, len(self.samples))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def inputs(self, sample: Any) -> dict[str, Tensor]:
        """Return what the processor makes of the prompt and its image, G times each."""
        size = self.shape.num_generations
        text = self.processor.apply_chat_template(sample.messages, tokenize=False, add_generation_prompt=True)
        images = [Image.open(path) for _ in range(size) for path in sample.images]
        options = {"return_tensors": "pt", "padding": True, "padding_side": "left", "add_special_tokens": False}
        made = self.processor(text=[text] * size, images=images, **options).to(self.model.device)
        return {**made, "mm_token_type_ids": self._types(made["input_ids"])}

    def rollout(self, inputs: dict[str, Tensor]) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Return (rows [G, P + C], P, images)."""
        self.model.eval()
        with self._autocast():
            ids = self.model.generate(**inputs, generation_config=self.generation)
        self.model.train()
        width = inputs["input_ids"].shape[1]
        if ids.shape[1] - width != self.shape.completion_length:
            raise RuntimeError(f"VLM-R1 drew {ids.shape[1] - width} tokens")
        return ids, width, {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}

    def advantages(self, completion_ids: Tensor) -> Tensor:
        texts = self.processor.batch_decode(completion_ids, skip_special_tokens=True)
        rewards = torch.tensor(self.reward(completions=texts), device=self.model.device)
        return (rewards - rewards.mean()) / (rewards.std() + ADVANTAGE_EPSILON)

    def _backward(
        self, ids: Tensor, width: int, images: dict[str, Tensor], advantages: Tensor, old: Tensor | None, parts: int
    ) -> float:
        """Reference pass, policy pass and backward of one micro-batch; its part of the loss."""
        with torch.no_grad():
            reference = self._logps(self.reference, ids, width, images)
        logp = self._logps(self.model, ids, width, images)
        ratio = (logp - (logp.detach() if old is None else old)).exp()
        gain = advantages[:, None]
        per_token = -torch.minimum(ratio * gain, ratio.clamp(1 - EPSILON, 1 + EPSILON) * gain)
        distance = reference - logp
        per_token = per_token + BETA * (distance.exp() - distance - 1)
        loss = per_token.mean(dim=1).mean() / parts
        loss.backward()
        return float(loss.detach())

    def _logps(self, model: Any, ids: Tensor, width: int, images: dict[str, Tensor]) -> Tensor:
        """Return log p of each completion token, through the logits of every position: [G, C]."""
        passed = {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": self._types(ids), "use_cache": False}
        with self._autocast():
            logits = model(input_ids=ids, **passed, **images).logits  # [G, P + C, V]
            rows = zip(logits[:, :-1], ids[:, 1:], strict=True)
            found = [row.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0] for row, targets in rows]
        return torch.stack(found)[:, width - 1 :]

    def _autocast(self) -> Any:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def _types(self, ids: Tensor) -> Tensor:
        """1 at image tokens: transformers 5 needs it to place them, 4.49 found them itself."""
        return (ids == self.model.config.image_token_id).long()


def given(group: Group, device: torch.device) -> tuple[Tensor, int, dict[str, Tensor], Tensor, Tensor]:
    """Return (rows [G, P + C], P, images, advantages [G], old log-probs [G, C]) of a group."""
    assert group.advantages is not None
    size, prompt = len(group.completions), group.prompt.input_ids
    completions = torch.stack([each.token_ids for each in group.completions])  # [G, C]
    old = torch.stack([each.logp for each in group.completions if each.logp is not None])
    images = {name: torch.cat([value] * size).to(device) for name, value in joined(group.prompt.images).items()}
    ids = torch.cat([prompt.repeat(size, 1), completions], dim=1).to(device)
    return ids, len(prompt), images, group.advantages.to(device), old.to(device)
