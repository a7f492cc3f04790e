"""Qwen3-VL: Qwen2.5-VL with deepstack features of the tower, added after the first decoder layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from vlmr1.models.families.qwen_vl import QwenVLFamily
from vlmr1.models.family import ImageFeatures
from vlmr1.types import ImageInputs


class Qwen3VLFamily(QwenVLFamily):
    """The deepstack features of an image are shared like its rows."""

    model_types = ("qwen3_vl",)
    merger_paths = ("model.visual.merger", "model.visual.deepstack_merger_list")

    def encode_images(self, model: Any, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        if not images:
            return []
        output, sizes = self._tower(model, images)
        layers = [each.split(sizes) for each in output.deepstack_features]
        deepstack = zip(*layers, strict=True)  # by layer, then image -> by image, then layer
        return [ImageFeatures(*each) for each in zip(output.pooler_output.split(sizes), deepstack, strict=True)]

    def encoder_output(self, features: Sequence[ImageFeatures]) -> Any:
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=[each.rows for each in features],  # type: ignore[arg-type]
            deepstack_features=list(zip(*(each.deepstack for each in features), strict=True)),  # type: ignore[arg-type]
        )
