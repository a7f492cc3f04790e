"""What all arms of a run have in common: one model, one reference model, one optimizer, the same prompts and groups."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import model as bench_model
from benchmarks.model import Shape
from vlmr1.data.prompts import PromptBuilder
from vlmr1.grpo.reference import frozen_copy
from vlmr1.models import family_of
from vlmr1.types import Group, Prompt


class Bed:
    """The model, in its dtype and where it computes; reference model and optimizer are made when first asked for. No
    completion ends before its length. `save`: the weights are written to `folder`, where peers read them."""

    def __init__(
        self, folder: Path, shape: Shape, *, device: str, dtype: torch.dtype, prompts: int, save: bool = False
    ):
        self.folder, self.shape, self.device, self.dtype = folder, shape, device, dtype
        model, self.processor = bench_model.build(folder, shape, device=device, dtype=dtype)
        self.model: Any = model
        if save:
            self.model.save_pretrained(folder)
        self.model.generation_config.eos_token_id = None
        if shape.checkpointing:
            self.model.gradient_checkpointing_enable()
        self.family = family_of(self.model)
        self.builder = PromptBuilder(self.model, self.family, self.processor)
        self.prompts = [bench_model.prompt_of(folder, self.builder, shape, index) for index in range(prompts)]
        self._reference: Any = None
        self._optimizer: Any = None

    @property
    def tokens(self) -> int:
        """Completion tokens of a step."""
        return len(self.prompts) * self.shape.num_generations * self.shape.completion_length

    def read(self) -> list[Prompt]:
        """The prompts from their files: as peers do it, within a step."""
        return [self.builder(prompt.sample) for prompt in self.prompts]

    def groups(self, *, flat: bool = False, shape: Shape | None = None) -> Sequence[Group]:
        """Fixed completions; `flat`: every second group has advantages of 0."""
        of = shape or self.shape
        made = bench_model.groups(self.folder, self.model, self.processor, len(self.prompts), of)
        return [_without_signal(group) if flat and index % 2 else group for index, group in enumerate(made)]

    def reference(self, *, frozen_tower: bool) -> Any:
        """The one reference model; `frozen_tower`: the policy's own tower in it, as where it is not trained."""
        if self._reference is None:
            self._reference = frozen_copy(self.model)
            bench_model.perturb(self._reference)
        if not frozen_tower:
            return self._reference
        shared = {id(parameter): parameter for parameter in self._reference.parameters()}
        towers = (self.family.vision_parameters(model) for model in (self._reference, self.model))
        shared |= {id(own): of_policy for own, of_policy in zip(*towers, strict=True)}
        return copy.deepcopy(self._reference, memo=shared)  # modules only: every parameter is in the memo

    def prepare(self, trainer: Any) -> Any:
        """The model as the trainer's accelerator wraps it; the first trainer's, as a second would wrap that."""
        if self._optimizer is None:
            self.model = trainer.accelerator.prepare(self.model)
            self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
        return self.model

    def optimize(self) -> None:
        """AdamW in the dtype of the weights; without clipping."""
        try:
            with _gradients_of_weights(self.model):
                self._optimizer.step()
        except torch.OutOfMemoryError:
            self._optimizer.state.clear()  # moments of some weights would be there, of others not
            raise
        finally:
            self.model.zero_grad(set_to_none=True)


@contextmanager
def _gradients_of_weights(model: Any) -> Iterator[None]:
    """Float32 gradients of bfloat16 weights in the dtype of the weights: torch's AdamW asks for that. The weights that
    rounding leaves where they are cost the same time."""
    narrow = [p for p in model.parameters() if p.grad is not None and p.grad.dtype != p.dtype]
    for parameter in narrow:
        gradient, parameter.grad, parameter.grad_dtype = parameter.grad.to(parameter.dtype), None, parameter.dtype
        parameter.grad = gradient
    try:
        yield
    finally:
        for parameter in narrow:
            parameter.grad, parameter.grad_dtype = None, torch.float32


def _without_signal(group: Group) -> Group:
    assert group.advantages is not None
    return replace(group, advantages=torch.zeros_like(group.advantages))
