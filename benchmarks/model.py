"""Qwen2.5-VL models with random weights, and groups of fixed random completions for them.

Everything follows from seeds: each process of a benchmark makes the same weights and the same groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmr1.data.prompts import PromptBuilder
from vlmr1.models import family_of, load_model, load_processor
from vlmr1.tiny import build as tiny
from vlmr1.tiny.build import SPECIAL, tokenizer
from vlmr1.types import Completion, Group, Prompt, Sample

# The embedded tiny model.
TINY_TEXT: dict[str, Any] = tiny.TEXT | {"vocab_size": 490}  # as many tokens as its tokenizer has
TINY_VISION: dict[str, Any] = tiny.VISION
BENCH_TEXT = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
}
BENCH_VISION = {
    "depth": 6,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_heads": 4,
    "out_hidden_size": 256,
    "window_size": 112,
    "fullatt_block_indexes": [2, 5],
}
# The published configuration of Qwen2.5-VL-3B.
TEXT_3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": True,
}
VISION_3B = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# Of Qwen2.5-VL-7B, whose tower is that of 3B.
TEXT_7B = TEXT_3B | {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
VISION_7B = VISION_3B | {"out_hidden_size": 3584}


@dataclass(frozen=True)
class Shape:
    """A model, and the groups that it is trained on. 28 x 28 px of an image are one token of the prompt."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    image_px: int
    num_generations: int = 8
    completion_length: int = 64
    prompt_length: int | None = None  # the question is made as long as it takes; None: one line
    checkpointing: bool = False  # of activations


SHAPES = {
    "tiny": Shape(TINY_TEXT, TINY_VISION, image_px=112, num_generations=4, completion_length=16),
    "bench": Shape(BENCH_TEXT, BENCH_VISION, image_px=448),
    "3b": Shape(TEXT_3B, VISION_3B, image_px=896, completion_length=128, checkpointing=True),
    "7b": Shape(TEXT_7B, VISION_7B, image_px=896, completion_length=128, checkpointing=True),
}
BENCH = SHAPES["bench"]


def config_of(shape: Shape, tokens: Any) -> Any:
    """The model's configuration, with the special tokens of the tiny model's tokenizer."""
    from transformers import Qwen2_5_VLConfig

    ids: dict[str, Any] = {token: tokens.convert_tokens_to_ids(token) for token in SPECIAL}
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    return Qwen2_5_VLConfig(
        text_config=deepcopy({**shape.text}) | ends | {"bos_token_id": ids["<|endoftext|>"]},
        vision_config=deepcopy({**shape.vision}),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.text.get("tie_word_embeddings", False),
    )


def write_processor(folder: Path) -> Any:
    """Tokenizer and image processor in the Hugging Face layout; the tokenizer."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokens = tokenizer()
    tokens.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    return tokens


def write(folder: Path, shape: Shape = BENCH, seed: int = 0) -> Path:
    """Model, tokenizer and image processor in the Hugging Face layout; float32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = config_of(shape, write_processor(folder))
    torch.manual_seed(seed)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


def read(folder: Path) -> tuple[Any, Any]:
    """(model, processor) that `write` wrote."""
    return load_model(folder), load_processor(folder)


def build(folder: Path, shape: Shape, *, device: str, dtype: torch.dtype, seed: int = 0) -> tuple[Any, Any]:
    """(model, processor), the model made where it is used; no weights are written."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = config_of(shape, write_processor(folder))
    config.save_pretrained(folder)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model, load_processor(folder)


def image_of(folder: Path, shape: Shape, index: int) -> Path:
    """Image `index`, of noise."""
    path = folder / f"{shape.image_px}-{index}.png"
    if not path.exists():
        pixels = np.random.default_rng(index).integers(0, 255, (shape.image_px, shape.image_px, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return path


def prompt_of(folder: Path, builder: PromptBuilder, shape: Shape, index: int) -> Prompt:
    """Prompt `index`, with an image of its own; SystemExit where `prompt_length` cannot be met."""
    path = image_of(folder, shape, index)

    def with_lines(count: int) -> Prompt:
        content = [{"type": "image"}, {"type": "text", "text": "Locate the digit 7" + "\n" * count}]  # a token each
        return builder(Sample([{"role": "user", "content": content}], (path,), "", "made", index))

    prompt = with_lines(0)
    if shape.prompt_length is None:
        return prompt
    prompt = with_lines(shape.prompt_length - len(prompt.input_ids))
    if len(prompt.input_ids) != shape.prompt_length:
        raise SystemExit(f"a prompt of {shape.prompt_length} tokens cannot be made with {shape.image_px} px")
    return prompt


def groups(
    folder: Path, model: Any, processor: Any, prompts: int, shape: Shape = BENCH, seed: int = 1
) -> Sequence[Group]:
    """Groups of random completions, all of `completion_length`, each group with its image."""
    random = torch.Generator().manual_seed(seed)
    builder = PromptBuilder(model, family_of(model), processor)
    vocabulary, size, length = shape.text["vocab_size"], shape.num_generations, shape.completion_length
    made = []
    for index in range(prompts):
        completions = []
        for _ in range(size):
            ids = torch.randint(len(SPECIAL), vocabulary, (length,), generator=random)
            # Near the log-probs of random weights, so that some ratios are clipped and most are not.
            logp = -float(np.log(vocabulary)) + 0.2 * torch.randn(length, generator=random)
            completions.append(Completion(ids, logp, logp, "", "length"))
        advantages = torch.randn(size, generator=random)
        prompt = prompt_of(folder, builder, shape, index)
        made.append(Group(prompt, tuple(completions), torch.zeros(size, 1), advantages))
    return made


def placeholders(model: Any) -> list[int]:
    """Tokens that random weights may draw, and that stand for an image which is not there."""
    return family_of(model).placeholder_ids(model)


def spread(completions: list, **_: Any) -> list[float]:
    """Rewards that differ within a group, whatever is drawn."""
    return [float(index % 3) for index in range(len(completions))]


@torch.no_grad()
def perturb(model: Any, seed: int = 2) -> None:
    """Move the weights of a reference model, so that it is not the policy."""
    device = next(model.parameters()).device
    random = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random, device=device, dtype=parameter.dtype)
        parameter.add_(0.01 * noise)
