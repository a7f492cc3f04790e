"""GLM-4V (GLM-4.1V and later dense models): grids and M-RoPE as in Qwen2-VL."""

from __future__ import annotations

from typing import Any

from vlmr1.models.families.qwen_vl import QwenVLFamily


class Glm4vFamily(QwenVLFamily):
    """Images and videos have start and end tokens of their own."""

    model_types = ("glm4v",)
    merger_paths = ("model.visual.downsample", "model.visual.merger")

    def placeholder_ids(self, model: Any, tokenizer: Any = None) -> list[int]:
        kinds = ("image", "image_start", "image_end", "video", "video_start", "video_end")
        return [getattr(model.config, f"{kind}_token_id") for kind in kinds]
