"""Cache of image features of a frozen tower, computed once a step for rollout, reference and policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlmr1.data.images import ImageRef
from vlmr1.models.family import ImageFeatures, ImageInputs, ModelFamily


class FeatureCache:
    """Encoded images by image reference, until `clear`. Policy and reference share the frozen tower."""

    def __init__(self) -> None:
        self.kept: dict[ImageRef, ImageFeatures] = {}

    def clear(self) -> None:
        self.kept.clear()


def encode(
    family: ModelFamily, model: Any, refs: Sequence[ImageRef], images: Sequence[ImageInputs], cache: FeatureCache | None
) -> list[ImageFeatures]:
    """Return the features of these images. With a cache, missing ones are encoded together, without gradient."""
    if cache is None:
        return family.encode_images(model, images)
    missing = {ref: image for ref, image in zip(refs, images, strict=True) if ref not in cache.kept}
    with torch.no_grad():
        cache.kept |= zip(missing, family.encode_images(model, list(missing.values())), strict=True)
    return [cache.kept[ref] for ref in refs]
