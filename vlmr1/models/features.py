"""Features of a step's images from a frozen tower: made once, read by rollout, reference and policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlmr1.data.images import ImageRef
from vlmr1.models.family import ImageFeatures, ImageInputs, ModelFamily
from vlmr1.types import Prompt


class FeatureCache:
    """Encoded images by where they are from, until `clear`. Policy and reference have the same frozen tower."""

    def __init__(self) -> None:
        self.kept: dict[ImageRef, ImageFeatures] = {}

    def clear(self) -> None:
        self.kept.clear()


def encode(
    family: ModelFamily, model: Any, refs: Sequence[ImageRef], images: Sequence[ImageInputs], cache: FeatureCache | None
) -> list[ImageFeatures]:
    """The features of these images. With a cache, those that it lacks are encoded together, without gradient."""
    if cache is None:
        return family.encode_images(model, images)
    missing = {ref: image for ref, image in zip(refs, images, strict=True) if ref not in cache.kept}
    with torch.no_grad():
        cache.kept |= zip(missing, family.encode_images(model, list(missing.values())), strict=True)
    return [cache.kept[ref] for ref in refs]


def unique_images(prompts: Sequence[Prompt]) -> tuple[tuple[ImageInputs, ...], tuple[ImageRef, ...], tuple[int, ...]]:
    """Return each distinct image once, its source, and for each placeholder run the index of its image."""
    refs = [ref for prompt in prompts for ref in prompt.sample.images]
    images: dict[ImageRef, ImageInputs] = {}
    for ref, image in zip(refs, (image for prompt in prompts for image in prompt.images), strict=True):
        images.setdefault(ref, image)
    index = {ref: i for i, ref in enumerate(images)}
    return tuple(images.values()), tuple(images), tuple(index[ref] for ref in refs)
