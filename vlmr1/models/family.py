"""The interface between the trainer and a model; a subclass for each family locates its parts and encodes images."""

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
from vlmr1.models.fused_layers import Operators, fused_layers, operators_for
from vlmr1.models.precision import zero_gradient
from vlmr1.models.tower import varlen_tower
from vlmr1.types import ImageInputs


@dataclass(frozen=True)
class ImageFeatures:
    """One encoded image: T rows, one for each placeholder."""

    rows: Tensor  # [T, D]
    deepstack: tuple[Tensor, ...] = ()  # [T, D] each, added after the first decoder layers (Qwen3-VL)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.rows, *self.deepstack


class ModelFamily(ABC):
    """Images, positions, decoder and head of a model. `model` is always the unwrapped model."""

    model_types: ClassVar[tuple[str, ...]]  # as in the config
    decoder_path: ClassVar[str] = "model.language_model"
    vision_paths: ClassVar[tuple[str, ...]] = ("model.visual",)  # tower and projector
    head_path: ClassVar[str] = "lm_head"
    merger_paths: ClassVar[tuple[str, ...]] = ("model.visual.merger",)  # the projector, a part of vision_paths
    varlen_tower: ClassVar[bool] = False  # the tower takes concatenated sequences with offsets
    operators: Operators | None = None  # of its passes, in place of stock layers

    # Images

    @abstractmethod
    def split_images(self, model: Any, inputs: Mapping[str, Tensor], count: int) -> tuple[ImageInputs, ...]:
        """Split the processor's tensors of one prompt with `count` images by image."""

    @abstractmethod
    def encode_images(self, model: Any, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        """Run vision tower and projector over all images at once."""

    @abstractmethod
    def encoder_output(self, features: Sequence[ImageFeatures]) -> Any:
        """Convert features to the argument `mm_encoder_outputs` of the model's forward."""

    @abstractmethod
    def generation_inputs(self, model: Any, input_ids: Tensor, images: Sequence[Sequence[ImageInputs]]) -> dict:
        """Arguments of `generate` for the images of each sequence, beside input_ids [B, L] and the mask."""

    @abstractmethod
    def placeholder_ids(self, model: Any, tokenizer: Any = None) -> list[int]:
        """Token ids of images and videos, which are never sampled: those in the config, and in a given tokenizer."""

    def tower_inputs(self, model: Any, images: Sequence[ImageInputs], dim: int = 0) -> dict[str, Tensor]:
        """Batch the inputs of several images on the tower's device."""
        device = next(attrgetter(self.vision_paths[0])(model).parameters()).device
        return {name: value.to(device, non_blocking=True) for name, value in joined(images, dim).items()}

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

        The decoder uses `shared` where given, else the model's own attention and `attention_mask`."""
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
        """Use shared attention in the decoder, variable-length attention in the tower, and `operators` within the
        block.

        A backward pass that recomputes layers must run inside the block."""
        tower = varlen_tower(attrgetter(self.vision_paths[0])(model)) if self.varlen_tower else nullcontext()
        decoder = shared_attention(attrgetter(self.decoder_path)(model))
        with tower, decoder, fused_layers(model, self.operators):
            yield

    def fuse_layers(self, setting: str, device: str) -> None:
        """Use the operators of `fused_layers` on this device in passes from now on."""
        self.operators = operators_for(setting, device)

    def head(self, model: Any) -> nn.Linear:
        """The vocabulary projection."""
        return attrgetter(self.head_path)(model)

    def vision_parameters(self, model: Any) -> list[nn.Parameter]:
        """Parameters of tower and projector."""
        return [p for path in self.vision_paths for p in attrgetter(path)(model).parameters()]

    def merger_parameters(self, model: Any) -> list[nn.Parameter]:
        """Parameters of the projector."""
        return [p for path in self.merger_paths for p in attrgetter(path)(model).parameters()]

    def fill_vision_gradients(self, model: Any) -> None:
        """Set missing gradients of a trained tower to zero: the last packs of a step may have no image."""
        for parameter in self.vision_parameters(model):
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = zero_gradient(parameter)


def joined(images: Sequence[ImageInputs], dim: int = 0) -> dict[str, Tensor]:
    """Concatenate the inputs of several images to one batch; {} for none."""
    return {name: torch.cat([each[name] for each in images], dim) for name in images[0]} if images else {}
