"""Qwen3-VL: as Qwen2.5-VL, with features of several tower layers that are added after the first decoder layers."""

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
        output = self._tower(model, images)
        deepstack = zip(*output.deepstack_features, strict=True)  # by layer, then image -> by image, then layer
        return [ImageFeatures(*each) for each in zip(output.pooler_output, deepstack, strict=True)]

    def encoder_output(self, features: Sequence[ImageFeatures]) -> Any:
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=[each.rows for each in features],  # type: ignore[arg-type]
            deepstack_features=list(zip(*(each.deepstack for each in features), strict=True)),  # type: ignore[arg-type]
        )
