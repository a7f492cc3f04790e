"""Adapter of the Qwen2-VL and Qwen2.5-VL families: everything the trainer asks of a model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmr1.models.attention import SharedAttention, shared_attention


class QwenVLAdapter:
    """Encode images, positions, decoder, head. `model` is always the unwrapped model."""

    model_types = ("qwen2_vl", "qwen2_5_vl")

    def placeholder_ids(self, model: Any) -> list[int]:
        """Token ids that stand for images; they are never sampled."""
        config = model.config
        return [
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        ]

    def positions(self, model: Any, input_ids: Tensor, image_inputs: dict[str, Tensor]) -> Tensor:
        """[L_p] token ids -> [3, L_p] M-RoPE positions, from the model's own rope index."""
        if not image_inputs:
            return torch.arange(len(input_ids), device=input_ids.device).expand(3, -1)
        types = (input_ids == model.config.image_token_id).int()
        positions, _ = model.model.get_rope_index(input_ids[None], types[None], image_inputs["image_grid_thw"])
        return positions[:, 0]

    def join_images(self, inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Image inputs of several prompts, in order, as one batch of images."""
        with_images = [each for each in inputs if each]
        if not with_images:
            return {}
        return {name: torch.cat([each[name] for each in with_images]) for name in with_images[0]}

    def encode_images(self, model: Any, image_inputs: dict[str, Tensor]) -> list[Tensor]:
        """Vision tower and merger: one [tokens, D] tensor an image."""
        if not image_inputs:
            return []
        device = next(model.model.visual.parameters()).device
        pixels = image_inputs["pixel_values"].to(device)
        return list(model.model.get_image_features(pixels, image_inputs["image_grid_thw"].to(device)).pooler_output)

    def hidden(
        self,
        model: Any,
        input_ids: Tensor,
        positions: Tensor,
        features: list[Tensor],
        *,
        shared: SharedAttention | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """[b, l] token ids, [3, b, l] positions -> last hidden states [b, l, D].

        With `shared` the decoder attends by it; without, by the model's own attention and `attention_mask`."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "position_ids": positions, "use_cache": False}
        if features:
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}  # type: ignore[arg-type]
        if shared is None:
            return model.model(**inputs, attention_mask=attention_mask).last_hidden_state
        with self.shared_attention(model):
            return model.model(**inputs, shared=shared).last_hidden_state

    def shared_attention(self, model: Any) -> AbstractContextManager[None]:
        """The decoder attends by `shared`; a backward that recomputes layers has to run inside it too."""
        return shared_attention(model.model.language_model)

    def head(self, model: Any) -> nn.Linear:
        """The vocabulary projection."""
        return model.lm_head

    def vision_parameters(self, model: Any) -> list[nn.Parameter]:
        return list(model.model.visual.parameters())
