"""The prompts and groups of a planned step: shapes as the settings allow at most, contents that mean nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlmr1.grpo.packing import make_pack, plan_packs
from vlmr1.models.family import ModelFamily
from vlmr1.planner.inputs import PlanInputs
from vlmr1.types import Completion, Group, ImageInputs, Pack, Prompt, Sample


def image_of(config: Any, tokens: int) -> tuple[ImageInputs, int]:
    """What a processor would make of an image of about so many tokens, and the tokens that it has: a nearly square grid
    of patches, or as many tiles as it takes."""
    vision = config.vision_config
    patch = _side(vision.patch_size)
    if config.model_type in ("internvl", "idefics3", "smolvlm"):
        size = _side(vision.image_size)
        if config.model_type == "internvl":
            per_tile = config.image_seq_length
        else:
            per_tile = (size // patch) ** 2 // config.scale_factor**2
        tiles = max(1, math.ceil(tokens / per_tile))
        pixels = torch.ones(tiles, 3, size, size)
        if config.model_type == "internvl":
            return {"pixel_values": pixels}, tiles * per_tile
        mask = torch.ones(1, tiles, size, size, dtype=torch.bool)
        return {"pixel_values": pixels[None], "pixel_attention_mask": mask}, tiles * per_tile
    height = max(1, math.isqrt(tokens))
    width = math.ceil(tokens / height)
    merge = vision.spatial_merge_size
    channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
    columns = channels * _side(vision.temporal_patch_size) * patch**2
    grid = torch.tensor([[1, height * merge, width * merge]])
    return {"pixel_values": torch.ones(int(grid.prod()), columns), "image_grid_thw": grid}, height * width


def image_bytes(inputs: PlanInputs) -> int:
    """Of what a processor makes of a prompt's image."""
    if not inputs.image_tokens:
        return 0
    tensors, _ = image_of(inputs.model, inputs.image_tokens)
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def _side(size: Any) -> int:
    return size if isinstance(size, int) else size[0]


def prompts_of(inputs: PlanInputs, family: ModelFamily, model: Any) -> list[Prompt]:
    """The prompts of a generation, each with an image of its own, or with none where image_tokens is 0."""
    config = inputs.model
    images: tuple[ImageInputs, ...] = ()
    tokens = 0
    if inputs.image_tokens:
        image, tokens = image_of(config, inputs.image_tokens)
        images = (image,)
    text = next(i for i in range(config.get_text_config().vocab_size) if i not in family.placeholder_ids(model))
    ids = torch.full((tokens + inputs.text_tokens,), text)
    before = inputs.text_tokens // 2
    ids[before : before + tokens] = config.image_token_id
    positions = family.positions(model, ids, images)
    prompts = []
    for index in range(inputs.prompts_per_device * inputs.steps_per_generation):
        refs = (Path(f"image-{index}"),) * len(images)
        prompts.append(Prompt(Sample([], refs, "", "planned", index), ids, positions, images))
    return prompts


def groups_of(inputs: PlanInputs, prompts: Sequence[Prompt]) -> list[Group]:
    """Groups whose completions all meet the length limit."""
    length, size = inputs.max_completion_length, inputs.num_generations
    ids, logp = torch.zeros(length, dtype=torch.long), torch.zeros(length)
    completions = tuple(Completion(ids, logp, logp, "", "length", old_logp=logp) for _ in range(size))
    return [Group(prompt, completions, torch.zeros(size, 1), torch.ones(size)) for prompt in prompts]


def largest_pack(groups: Sequence[Group], inputs: PlanInputs) -> tuple[Pack, bool]:
    """The pack of the most tokens of an update, and whether there are others before or after it."""
    options = {"share_prompt": inputs.share_prompt, "pack": inputs.pack}
    rows = plan_packs(groups, tokens_per_pack=inputs.tokens_per_pack, **options)
    packs = [make_pack(row, share_vision=inputs.share_vision) for row in rows]
    return max(packs, key=lambda pack: len(pack.input_ids)), len(packs) > 1
