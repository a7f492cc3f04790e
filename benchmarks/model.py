"""Qwen2.5-VL models with random weights, and groups of fixed random completions for them.

Everything follows from seeds: each process of a benchmark makes the same weights and the same groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmr1.data.prompts import PromptBuilder
from vlmr1.models import family_of, load_processor
from vlmr1.tiny import build as tiny
from vlmr1.tiny.build import SPECIAL, tokenizer
from vlmr1.types import Completion, Group, Prompt, Sample
from vlmr1_kernels import group_advantages

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
TINY_TEXT: dict[str, Any] = tiny.TEXT | {"vocab_size": 490}  # as many tokens as its tokenizer has
BENCH_TEXT: dict[str, Any] = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
BENCH_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
BENCH_TEXT |= {"rope_parameters": ROPE}
BENCH_VISION: dict[str, Any] = {"depth": 6, "hidden_size": 256, "intermediate_size": 688, "num_heads": 4}
BENCH_VISION |= {"out_hidden_size": 256, "window_size": 112, "fullatt_block_indexes": [2, 5]}
# The published configurations of Qwen2.5-VL; 7B has the vision tower of 3B.
TEXT_3B: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008}
TEXT_3B |= {"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": True}
TEXT_3B |= {"max_position_embeddings": 128000}
TEXT_3B |= {"rope_parameters": ROPE | {"rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}}
VISION_3B: dict[str, Any] = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
VISION_3B |= {"out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
TEXT_7B = TEXT_3B | {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
TEXT_7B |= {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
VISION_7B = VISION_3B | {"out_hidden_size": 3584}
QUESTION = "Locate the digit 7"


@dataclass(frozen=True)
class Shape:
    """A model, and the groups that it is trained on. 28 x 28 px of an image are one token of the prompt."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    image_px: int
    num_generations: int = 8
    completion_length: int = 64
    prompts: int = 2  # of a step: half of the groups can be without signal
    checkpointing: bool = False  # of activations

    @property
    def image_tokens(self) -> int:
        return (self.image_px // 28) ** 2

    @property
    def completion_tokens(self) -> int:
        """Completion tokens of a step."""
        return self.prompts * self.num_generations * self.completion_length


SHAPES = {
    "tiny": Shape(TINY_TEXT, tiny.VISION, image_px=112, num_generations=4, completion_length=16),
    "bench": Shape(BENCH_TEXT, BENCH_VISION, image_px=448),
    # more completion than prompt: there is less to share
    "long": Shape(BENCH_TEXT, BENCH_VISION, image_px=448, completion_length=512),
    "3b": Shape(TEXT_3B, VISION_3B, image_px=896, completion_length=128, checkpointing=True),
    "7b": Shape(TEXT_7B, VISION_7B, image_px=896, completion_length=128, checkpointing=True),
}


def config_of(shape: Shape, tokens: Any) -> Any:
    """Return the model's configuration, with the special tokens of this tokenizer."""
    from transformers import Qwen2_5_VLConfig

    ids: dict[str, Any] = {token: tokens.convert_tokens_to_ids(token) for token in SPECIAL}
    end, start = ids["<|im_end|>"], ids["<|endoftext|>"]
    text = deepcopy({**shape.text}) | {"eos_token_id": end, "pad_token_id": start, "bos_token_id": start}
    given = {f"{name}_token_id": ids[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    given |= {f"{name}_token_id": ids[f"<|{name}_pad|>"] for name in ("image", "video")}
    given |= {"tie_word_embeddings": shape.text.get("tie_word_embeddings", False)}
    return Qwen2_5_VLConfig(text_config=text, vision_config=deepcopy({**shape.vision}), **given)


def write_processor(folder: Path) -> Any:
    """Write tokenizer and image processor in the Hugging Face layout; return the tokenizer."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokens = tokenizer()
    tokens.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    return tokens


def build(folder: Path, shape: Shape, *, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Return (model, processor). Completions never end before their length; no weights are written."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = config_of(shape, write_processor(folder))
    config.save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    model.to(dtype)
    model.generation_config.eos_token_id = None
    return model, load_processor(folder)


def image_of(folder: Path, shape: Shape, index: int) -> Path:
    """Return image `index`, of noise; it is written when first asked for."""
    path = folder / f"{shape.image_px}-{index}.png"
    if not path.exists():
        pixels = np.random.default_rng(index).integers(0, 255, (shape.image_px, shape.image_px, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return path


def sample_of(folder: Path, shape: Shape, index: int) -> Sample:
    """Return row `index`, with an image of its own."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return Sample([{"role": "user", "content": content}], (image_of(folder, shape, index),), "", "made", index)


def prompts_of(folder: Path, model: Any, processor: Any, shape: Shape) -> list[Prompt]:
    """Return the prompts of a step, made from their files."""
    builder = PromptBuilder(model, family_of(model), processor)
    return [builder(sample_of(folder, shape, index)) for index in range(shape.prompts)]


def groups_of(prompts: Sequence[Prompt], shape: Shape) -> list[Group]:
    """Return groups of random completions, all of the same length, with the advantages of `rewards`."""
    random = torch.Generator().manual_seed(1)
    vocabulary, size, length = shape.text["vocab_size"], shape.num_generations, shape.completion_length
    scores = torch.tensor(rewards(size)([None] * size))
    made = []
    for prompt in prompts:
        completions = []
        for _ in range(size):
            ids = torch.randint(len(SPECIAL), vocabulary, (length,), generator=random)
            # Near the log-probs of random weights, so that some ratios are clipped and most are not.
            logp = -float(np.log(vocabulary)) + 0.2 * torch.randn(length, generator=random)
            completions.append(Completion(ids, logp, logp, "", "length"))
        made.append(Group(prompt, tuple(completions), scores[:, None], group_advantages(scores, size)))
    return made


def rewards(size: int, *, flat: bool = False) -> Callable[..., list[float]]:
    """Return a reward function whose values differ within a group of `size`, whatever is drawn.

    `flat`: every second group has equal rewards."""

    def spread(completions: Sequence[Any], **_: Any) -> list[float]:
        places = range(len(completions))
        return [0.0 if flat and index // size % 2 else float(index % size % 3) for index in places]

    return spread


@torch.no_grad()
def perturb(model: Any) -> None:
    """Move the decoder's weights of a reference model, so that it is not the policy.

    The vision tower stays: where it is frozen, policy and reference share it."""
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(2)
    tower = {id(parameter) for parameter in family_of(model).vision_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in tower:
            noise = torch.randn(parameter.shape, generator=random, device=device, dtype=parameter.dtype)
            parameter.add_(0.01 * noise)


def use_checkpointing(model: Any, **options: Any) -> None:
    """Switch activation checkpointing on, by the name that the installed transformers has for it."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable(**({f"{name.removesuffix('enable')}kwargs": options} if options else {}))


def gradient_norm(model: Any) -> float:
    norms = [parameter.grad.float().norm() for parameter in model.parameters() if parameter.grad is not None]
    return float(torch.stack(norms).norm())
