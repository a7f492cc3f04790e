"""Images of several prompts, and the cache of a frozen tower's features for rollout, reference and policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlmr1.models.family import ImageFeatures, ModelFamily
from vlmr1.types import ImageInputs, ImageRef, Prompt

Images = tuple[tuple[ImageInputs, ...], tuple[ImageRef, ...], tuple[int, ...]]


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


def all_images(prompts: Sequence[Prompt]) -> Images:
    """As `unique_images`, each image as often as it stands in a prompt."""
    images = tuple(image for prompt in prompts for image in prompt.images)
    refs = tuple(ref for prompt in prompts for ref in prompt.sample.images)
    return images, refs, tuple(range(len(images)))


def unique_images(prompts: Sequence[Prompt]) -> Images:
    """The images to encode, each once, their references, and the index of the image at each placeholder run."""
    images: dict[ImageRef, ImageInputs] = {}
    every, refs, _ = all_images(prompts)
    for ref, image in zip(refs, every, strict=True):
        images.setdefault(ref, image)
    place = {ref: i for i, ref in enumerate(images)}
    return tuple(images.values()), tuple(images), tuple(place[ref] for ref in refs)
