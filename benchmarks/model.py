"""A Qwen2.5-VL of benchmark size with random weights, and groups of fixed random completions for it.

Everything follows from seeds: each process of a benchmark makes the same weights and the same groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlmr1.data.prompts import PromptBuilder
from vlmr1.models import adapter_of, load_model, load_processor
from vlmr1.tiny.build import SPECIAL, tokenizer
from vlmr1.types import Completion, Group, Sample

VOCABULARY = 8192
IMAGE_PX = 448  # 32 x 32 patches of 14 px, merged 2 x 2: 256 image tokens
NUM_GENERATIONS = 8
COMPLETION_LENGTH = 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
}
VISION = {
    "depth": 6,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_heads": 4,
    "out_hidden_size": 256,
    "window_size": 112,
    "fullatt_block_indexes": [2, 5],
}


def write(folder: Path, seed: int = 0) -> Path:
    """Model, tokenizer and image processor in the Hugging Face layout; float32."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokens = tokenizer()
    tokens.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)
    ids: dict[str, Any] = {token: tokens.convert_tokens_to_ids(token) for token in SPECIAL}
    ends = {"eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"]}
    config = Qwen2_5_VLConfig(
        text_config=TEXT | ends | {"bos_token_id": ids["<|endoftext|>"]},
        vision_config=VISION,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    random = np.random.default_rng(seed)
    for index in range(8):
        pixels = random.integers(0, 255, (IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def read(folder: Path) -> tuple[Any, Any]:
    """(model, processor) that `write` wrote."""
    return load_model(folder), load_processor(folder)


def groups(folder: Path, model: Any, processor: Any, prompts: int, seed: int = 1) -> list[Group]:
    """Groups of NUM_GENERATIONS random completions of COMPLETION_LENGTH tokens, each group with its image."""
    random = torch.Generator().manual_seed(seed)
    builder = PromptBuilder(model, adapter_of(model), processor)
    content = [{"type": "image"}, {"type": "text", "text": "Locate the digit 7."}]
    made = []
    for index in range(prompts):
        sample = Sample([{"role": "user", "content": content}], (folder / f"{index}.png",), "", "made", index)
        completions = []
        for _ in range(NUM_GENERATIONS):
            ids = torch.randint(len(SPECIAL), VOCABULARY, (COMPLETION_LENGTH,), generator=random)
            # Near the log-probs of random weights, so that some ratios are clipped and most are not.
            logp = -float(np.log(VOCABULARY)) + 0.2 * torch.randn(COMPLETION_LENGTH, generator=random)
            completions.append(Completion(ids, logp, logp, "", "length"))
        advantages = torch.randn(NUM_GENERATIONS, generator=random)
        rewards = torch.zeros(NUM_GENERATIONS, 1)
        made.append(Group(builder(sample), tuple(completions), rewards, advantages))
    return made


@torch.no_grad()
def perturb(model: Any, seed: int = 2) -> None:
    """Move the weights of a reference model, so that it is not the policy."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=random))
