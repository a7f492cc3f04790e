"""Qwen2-VL and Qwen2.5-VL, and the base of other families with M-RoPE and patch grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmr1.models.family import ImageFeatures, ModelFamily, joined
from vlmr1.models.tower import grid_inputs, patches_by_matmul
from vlmr1.types import ImageInputs


class QwenVLFamily(ModelFamily):
    """Images are runs of patches with a grid [1, 3] each; positions come from the model's rope index."""

    model_types = ("qwen2_vl", "qwen2_5_vl")
    varlen_tower = True

    def placeholder_ids(self, model: Any, tokenizer: Any = None) -> list[int]:
        kinds = ("image", "video", "vision_start", "vision_end")
        return [getattr(model.config, f"{kind}_token_id") for kind in kinds]

    def positions(self, model: Any, input_ids: Tensor, images: Sequence[ImageInputs]) -> Tensor:
        if not images:
            return torch.arange(len(input_ids), device=input_ids.device).expand(3, -1)
        types = (input_ids == model.config.image_token_id).int()
        grids = torch.cat([image["image_grid_thw"] for image in images])
        positions, _ = model.model.get_rope_index(input_ids[None], types[None], grids)
        return positions[:, 0]

    def split_images(self, model: Any, inputs: Mapping[str, Tensor], count: int) -> tuple[ImageInputs, ...]:
        if not count:
            return ()
        grids = inputs["image_grid_thw"]
        pixels = inputs["pixel_values"].split(grids.prod(-1).tolist())
        return tuple(
            {"pixel_values": patches, "image_grid_thw": grid[None]} for patches, grid in zip(pixels, grids, strict=True)
        )

    def encode_images(self, model: Any, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        if not images:
            return []
        output, sizes = self._tower(model, images)
        return [ImageFeatures(rows) for rows in output.pooler_output.split(sizes)]

    def _tower(self, model: Any, images: Sequence[ImageInputs]) -> tuple[Any, list[int]]:
        """Return what the tower gives for all images, and the number of rows of each."""
        tower = model.model.visual
        inputs = self.tower_inputs(model, images)
        grids = torch.cat([image["image_grid_thw"] for image in images])  # in host memory
        given = grid_inputs(tower, grids)
        for name, each in given.items():
            given[name] = each.to(tower.device, non_blocking=True) if isinstance(each, Tensor) else each
        pixels = inputs["pixel_values"].to(tower.dtype)
        with patches_by_matmul(tower):
            output = tower(pixels, grid_thw=inputs["image_grid_thw"], return_dict=True, **given)
        return output, (grids.prod(-1) // tower.spatial_merge_size**2).tolist()

    def encoder_output(self, features: Sequence[ImageFeatures]) -> Any:
        return BaseModelOutputWithPooling(pooler_output=[each.rows for each in features])  # type: ignore[arg-type]

    def generation_inputs(self, model: Any, input_ids: Tensor, images: Sequence[Sequence[ImageInputs]]) -> dict:
        types = (input_ids == model.config.image_token_id).int()
        return {"mm_token_type_ids": types, **joined([image for each in images for image in each])}
