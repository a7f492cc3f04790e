"""InternVL in the classes of transformers: square tiles and a thumbnail, one placeholder run an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmr1.models.families.runs import runs
from vlmr1.models.family import ImageFeatures, ModelFamily, joined
from vlmr1.models.tower import patches_by_matmul
from vlmr1.types import ImageInputs


class InternVLFamily(ModelFamily):
    """An image is its tiles [tiles, 3, H, W]; each gives the same number of rows."""

    model_types = ("internvl",)
    vision_paths = ("model.vision_tower", "model.multi_modal_projector")
    merger_paths = ("model.multi_modal_projector",)

    def placeholder_ids(self, model: Any, tokenizer: Any = None) -> list[int]:
        if tokenizer is None:
            return [model.config.image_token_id]
        # Attributes that the processor reads.
        names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
        return tokenizer.convert_tokens_to_ids([getattr(tokenizer, name) for name in names])

    def split_images(self, model: Any, inputs: Mapping[str, Tensor], count: int) -> tuple[ImageInputs, ...]:
        if not count:
            return ()
        pixels = inputs["pixel_values"]  # [tiles, 3, H, W]
        lengths = [end - start for start, end in runs(inputs["input_ids"][0] == model.config.image_token_id)]
        tiles = [length * len(pixels) // sum(lengths) for length in lengths]
        if len(tiles) != count or sum(tiles) != len(pixels):
            raise ValueError(f"{count} images of {len(pixels)} tiles do not fit placeholder runs of {lengths} tokens")
        return tuple({"pixel_values": part} for part in pixels.split(tiles))

    def encode_images(self, model: Any, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        if not images:
            return []
        inputs = self.tower_inputs(model, images)
        with patches_by_matmul(model.model.vision_tower):
            rows = model.model.get_image_features(**inputs).pooler_output  # [tiles, S, D]
        parts = rows.split([len(image["pixel_values"]) for image in images])
        return [ImageFeatures(part.flatten(0, 1)) for part in parts]

    def encoder_output(self, features: Sequence[ImageFeatures]) -> Any:
        rows = torch.cat([each.rows for each in features])[None]
        return BaseModelOutputWithPooling(pooler_output=rows)  # type: ignore[arg-type]

    def generation_inputs(self, model: Any, input_ids: Tensor, images: Sequence[Sequence[ImageInputs]]) -> dict:
        return joined([image for each in images for image in each])
