"""Idefics3 and SmolVLM: an image is split into tiles, each with its own placeholder run and tag."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmr1.models.families.runs import runs
from vlmr1.models.family import ImageFeatures, ModelFamily
from vlmr1.models.tower import patches_by_matmul
from vlmr1.types import ImageInputs

# Tokens around the placeholders in both families; not every tokenizer has all of them.
AROUND = re.compile(r"<fake_token_around_image>|<global-img>|<row_\d+_col_\d+>|<image>|<video>")


class Idefics3Family(ModelFamily):
    """An image is its tiles [1, tiles, 3, H, W], the whole image as the last, and a mask of their pixels."""

    model_types = ("idefics3", "smolvlm")
    decoder_path = "model.text_model"
    vision_paths = ("model.vision_model", "model.connector")
    merger_paths = ("model.connector",)

    def placeholder_ids(self, model: Any, tokenizer: Any = None) -> list[int]:
        around = [] if tokenizer is None else tokenizer.get_added_vocab().items()
        return sorted({model.config.image_token_id, *(i for token, i in around if AROUND.fullmatch(token))})

    def split_images(self, model: Any, inputs: Mapping[str, Tensor], count: int) -> tuple[ImageInputs, ...]:
        if not count:
            return ()
        tiles = tiles_of_images(inputs["input_ids"][0], model.config.image_token_id)
        found = inputs["pixel_values"].shape[1]
        if len(tiles) != count or sum(tiles) != found:
            raise ValueError(f"{count} images of {found} tiles do not fit placeholder runs of {tiles} tiles")
        names = [name for name in ("pixel_values", "pixel_attention_mask") if name in inputs]
        parts = zip(*(inputs[name].split(tiles, 1) for name in names), strict=True)
        return tuple(dict(zip(names, part, strict=True)) for part in parts)

    def encode_images(self, model: Any, images: Sequence[ImageInputs]) -> list[ImageFeatures]:
        if not images:
            return []
        tiles = [image["pixel_values"].shape[1] for image in images]
        with patches_by_matmul(model.model.vision_model):
            (rows,) = model.model.get_image_features(**self.tower_inputs(model, images, dim=1)).pooler_output  # [T, D]
        per_tile = len(rows) // sum(tiles)
        return [ImageFeatures(part) for part in rows.split([n * per_tile for n in tiles])]

    def encoder_output(self, features: Sequence[ImageFeatures]) -> Any:
        return BaseModelOutputWithPooling(pooler_output=[each.rows for each in features])  # type: ignore[arg-type]

    def generation_inputs(self, model: Any, input_ids: Tensor, images: Sequence[Sequence[ImageInputs]]) -> dict:
        """Pad sequences with fewer tiles with zeros, which the model ignores."""
        some = next((image for each in images for image in each), None)
        if some is None:
            return {}
        width = max(sum(image["pixel_values"].shape[1] for image in each) for each in images)
        batch = {}
        for name, value in some.items():
            batch[name] = value.new_zeros(len(images), width, *value.shape[2:])
            for row, each in zip(batch[name], images, strict=True):
                if each:
                    tiles = torch.cat([image[name][0] for image in each])
                    row[: len(tiles)] = tiles
        return batch


def tiles_of_images(input_ids: Tensor, image_token: int) -> list[int]:
    """[L] token ids -> the number of tiles of each image.

    A separator and a tag precede the run of each tile. The tag is the tile's row and column, or, for the last tile of
    an image, the tag of the whole image. The prompt's last run has the latter, and the separator follows it. So neither
    token needs to be known, nor whether a tag is a single token."""
    ids = input_ids.tolist()
    found = runs(input_ids == image_token)
    separator = ids[found[-1][1]]
    tags = []
    for start, _ in found:
        length = ids[:start][::-1].index(separator)
        tags.append(ids[start - length : start])
    ends = [i + 1 for i, tag in enumerate(tags) if tag == tags[-1]]
    return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
