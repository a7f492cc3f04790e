"""One job to plan: settings as `vlmr1 train` takes them, and the prompts and groups of its largest step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from vlmr1.errors import SettingError
from vlmr1.grpo.packing import make_pack, plan_packs
from vlmr1.models.family import ModelFamily
from vlmr1.types import Completion, Group, ImageInputs, Pack, Prompt, Sample

# Settings that no dry run depends on: they change what is there besides it, or nothing.
NOT_RUN = {"output_dir", "run_name", "optim", "optim_args", "beta", "reference"}


@dataclass(frozen=True)
class Job:
    """Settings, a model configuration, and what no setting says. Lengths are upper limits."""

    args: Any = field(repr=False)  # the settings of a run
    config: Any = field(repr=False)
    device: Literal["cuda", "cpu"] = "cuda"
    gpus: int = 1
    zero: int = 0  # stage; 3 also stands for FSDP
    image_tokens: int = 1024  # of a prompt, one image
    text_tokens: int = 128
    device_bytes: int = 80 * 2**30  # of one GPU

    def __post_init__(self):
        for name in ("gpus", "text_tokens"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.image_tokens < 0:
            raise SettingError(f"image_tokens is {self.image_tokens}: it must not be negative")
        if self.zero not in (0, 1, 2, 3):
            raise SettingError(f"zero is {self.zero}: a stage from 0 to 3")

    @property
    def prompt_tokens(self) -> int:
        return self.image_tokens + self.text_tokens

    @property
    def prompts(self) -> int:
        """Prompts of one generation on one device."""
        return self.args.prompts_per_device * self.args.steps_per_generation

    @property
    def reference(self) -> Literal["none", "copy", "adapter", "offload"]:
        """The kind of reference model that the run has."""
        return self.args.reference_kind

    @property
    def offloads(self) -> bool:
        """Return whether what activation checkpointing keeps is in host memory."""
        kwargs = self.args.activation_checkpointing_kwargs or {}
        return self.args.activation_checkpointing and (self.args.activation_offload or bool(kwargs.get("offload")))

    @property
    def shards_weights(self) -> bool:
        return self.zero == 3 and self.gpus > 1

    @property
    def shards_gradients(self) -> bool:
        return self.zero >= 2 and self.gpus > 1

    @property
    def holds_frozen(self) -> bool:
        """Return whether frozen float32 weights are held in bfloat16: not where DeepSpeed or FSDP holds all weights."""
        args = self.args
        frozen = args.use_peft or args.freeze_vision or args.freeze_merger
        return bool(frozen) and args.bf16 and args.model_dtype == "float32" and self.zero == 0

    def run_key(self) -> tuple[Any, ...]:
        """A key that two jobs share if their dry runs are equal."""
        settings = [(f.name, str(getattr(self.args, f.name))) for f in fields(self.args) if f.name not in NOT_RUN]
        shape = self.device, self.image_tokens, self.text_tokens
        places = self.device_bytes, self.shards_gradients, self.shards_weights, self.holds_frozen
        return self.config.to_json_string(), *shape, *places, self.reference == "none", *settings


def image_of(config: Any, tokens: int) -> tuple[ImageInputs, int]:
    """A processor's output for an image of about so many tokens, and its exact number of tokens. The image is a nearly
    square grid of patches, or several tiles."""
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


def image_bytes(job: Job) -> int:
    """Bytes of the processor's output for the image of one prompt."""
    if not job.image_tokens:
        return 0
    tensors, _ = image_of(job.config, job.image_tokens)
    return sum(tensor.nbytes for tensor in tensors.values())


def _side(size: Any) -> int:
    return size if isinstance(size, int) else size[0]


def prompts_of(job: Job, family: ModelFamily, model: Any) -> list[Prompt]:
    """The prompts of a generation, each with an image of its own, or with none where image_tokens is 0."""
    config = job.config
    images: tuple[ImageInputs, ...] = ()
    tokens = 0
    if job.image_tokens:
        image, tokens = image_of(config, job.image_tokens)
        images = (image,)
    text = next(i for i in range(config.get_text_config().vocab_size) if i not in family.placeholder_ids(model))
    ids = torch.full((tokens + job.text_tokens,), text)
    before = job.text_tokens // 2
    ids[before : before + tokens] = config.image_token_id
    positions = family.positions(model, ids, images)
    prompts = []
    for index in range(job.prompts):
        refs = (Path(f"image-{index}"),) * len(images)
        prompts.append(Prompt(Sample([], refs, "", "planned", index), ids, positions, images))
    return prompts


def packs_of(job: Job, prompts: Sequence[Prompt]) -> list[Pack]:
    """The packs of an update whose completions all reach the length limit."""
    args = job.args
    ids, logp = torch.zeros(args.max_completion_length, dtype=torch.long), torch.zeros(args.max_completion_length)
    completions = tuple(Completion(ids, logp, logp, "", "length") for _ in range(args.num_generations))
    size = args.num_generations
    groups = [Group(prompt, completions, torch.zeros(size, 1), torch.ones(size)) for prompt in prompts]
    options = {"share_prompt": args.share_prompt, "pack": args.pack}
    rows = plan_packs(groups, tokens_per_pack=args.tokens_per_pack, **options)
    return [make_pack(row, share_vision=args.share_vision) for row in rows]


def largest_pack(job: Job, prompts: Sequence[Prompt]) -> tuple[Pack, bool]:
    """The largest pack of such an update, and whether it has other packs."""
    packs = packs_of(job, prompts)
    return max(packs, key=lambda pack: len(pack.input_ids)), len(packs) > 1
