"""What the trainer asks of a model; one subclass a family says where its parts are and what its tower makes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmr1.models.attention import SharedAttention, shared_attention
from vlmr1.models.precision import zero_gradient
from vlmr1.models.tower import varlen_tower
from vlmr1.types import ImageInputs


@dataclass(frozen=True)
class ImageFeatures:
    """One encoded image: the rows that stand at its placeholders, T of them."""

    rows: Tensor  # [T, D]
    deepstack: tuple[Tensor, ...] = ()  # [T, D] each, added after the first decoder layers (Qwen3-VL)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.rows, *self.deepstack


class ModelFamily(ABC):
    """Images, positions, decoder, head. `model` is always the unwrapped model."""

    model_types: ClassVar[tuple[str, ...]]  # of the config
    decoder_path: ClassVar[str] = "model.language_model"
    vision_paths: ClassVar[tuple[str, ...]] = ("model.visual",)  # tower and projector
    head_path: ClassVar[str] = "lm_head"
    merger_paths: ClassVar[tuple[str, ...]] = ("model.visual.merger",)  # of these, the projector
    varlen_tower: ClassVar[bool] = False  # the tower's rows are sequences in a row, with their offsets

    # Images

    @abstractmethod
    def split_images(self, model: Any, inputs: Mapping[str, Tensor], count: int) -> tuple[ImageInputs, ...]:
        """What the processor made of one prompt with `count` images, image by image."""

    @abstractmethod
    def encode_images(self, model: Any, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        """Vision tower and projector over all of them at once."""

    @abstractmethod
    def encoder_output(self, features: Sequence[ImageFeatures]) -> Any:
        """The features as the model's forward takes them, in `mm_encoder_outputs`."""

    @abstractmethod
    def generation_inputs(self, model: Any, input_ids: Tensor, images: Sequence[Sequence[ImageInputs]]) -> dict:
        """What `generate` needs beside input_ids [B, L] and the mask: the images of each sequence."""

    @abstractmethod
    def placeholder_ids(self, model: Any, tokenizer: Any = None) -> list[int]:
        """Token ids that belong to images or videos and are never sampled: those that the model's config names, and
        with a tokenizer also those that only it has."""

    def tower_inputs(self, model: Any, images: Sequence[ImageInputs], dim: int = 0) -> dict[str, Tensor]:
        """Inputs of several images as one batch, where the tower is."""
        device = next(attrgetter(self.vision_paths[0])(model).parameters()).device
        return {name: value.to(device) for name, value in joined(images, dim).items()}

    # Decoder

    def positions(self, model: Any, input_ids: Tensor, images: Sequence[ImageInputs]) -> Tensor:
        """[L_p] token ids -> [K, L_p] positions; K is 1, or 3 with M-RoPE."""
        return torch.arange(len(input_ids), device=input_ids.device)[None]

    def hidden(
        self,
        model: Any,
        input_ids: Tensor,
        positions: Tensor,
        features: Sequence[ImageFeatures],
        *,
        shared: SharedAttention | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """[b, l] token ids, [K, b, l] positions -> last hidden states [b, l, D].

        With `shared` the decoder attends by it; without, by the model's own attention and `attention_mask`."""
        positions = positions if len(positions) > 1 else positions[0]
        inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": positions, "use_cache": False}
        if features:
            inputs["mm_encoder_outputs"] = {"image": self.encoder_output(features)}
        if shared is None:
            return model.model(**inputs, attention_mask=attention_mask).last_hidden_state
        with shared_attention(attrgetter(self.decoder_path)(model)):
            return model.model(**inputs, shared=shared).last_hidden_state

    @contextmanager
    def attention(self, model: Any) -> Iterator[None]:
        """The decoder attends by `shared`, the tower without a loop over its images and windows; a backward that
        recomputes layers has to run inside it too."""
        tower = varlen_tower(attrgetter(self.vision_paths[0])(model)) if self.varlen_tower else nullcontext()
        with tower, shared_attention(attrgetter(self.decoder_path)(model)):
            yield

    def head(self, model: Any) -> nn.Linear:
        """The vocabulary projection."""
        return attrgetter(self.head_path)(model)

    def vision_parameters(self, model: Any) -> list[nn.Parameter]:
        """Of tower and projector."""
        return [p for path in self.vision_paths for p in attrgetter(path)(model).parameters()]

    def merger_parameters(self, model: Any) -> list[nn.Parameter]:
        """Of the projector alone."""
        return [p for path in self.merger_paths for p in attrgetter(path)(model).parameters()]

    def fill_vision_gradients(self, model: Any) -> None:
        """Zeros where a trained tower has no gradient yet: what is left of a step may have no image, the step has."""
        for parameter in self.vision_parameters(model):
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = zero_gradient(parameter)


def joined(images: Sequence[ImageInputs], dim: int = 0) -> dict[str, Tensor]:
    """Inputs of several images as one batch; empty for none."""
    return {name: torch.cat([each[name] for each in images], dim) for name in images[0]} if images else {}
