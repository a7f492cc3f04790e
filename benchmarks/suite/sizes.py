"""How large a shape is: parameters, bytes of a step, and what the result file says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks import model as bench_model
from benchmarks.attention import DTYPES
from benchmarks.model import SHAPES, Shape
from vlmr1.data.prompts import PromptBuilder
from vlmr1.models import family_of, load_processor
from vlmr1.tiny.build import tokenizer
from vlmr1.types import Prompt

PROMPTS = 2  # of a step: half of the groups can be without signal
LOGITS = 6  # float32 copies of the naive pass's logits that are alive at once, gradients included


def parameters(shape: Shape) -> int:
    """Of the model, shared ones once."""
    return count(shape, without_weights(bench_model.config_of(shape, tokenizer())))


def without_weights(config: Any) -> Any:
    """The model on the meta device, where weights take no memory."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        return Qwen2_5_VLForConditionalGeneration(config)


def count(shape: Shape, model: Any) -> int:
    """Parameters, shared ones once, on the meta device too, where they are two."""
    tied = shape.text.get("tie_word_embeddings", False)
    return sum(p.numel() for name, p in model.named_parameters() if not (tied and name.startswith("lm_head.")))


def needed_bytes(shape: Shape, dtype: str) -> int:
    """Of a whole step: policy, reference, float32 gradients, two moments; and the logits of one naive pass."""
    weight = DTYPES[dtype].itemsize
    logits = 4 * shape.num_generations * shape.completion_length * shape.text["vocab_size"]
    return parameters(shape) * (4 * weight + 4) + LOGITS * logits


def largest(free: int, dtype: str) -> str:
    """The largest shape whose step fits in this many bytes; the smallest where none does."""
    fitting = [name for name, shape in SHAPES.items() if needed_bytes(shape, dtype) <= free]
    return fitting[-1] if fitting else next(iter(SHAPES))


def without_model(folder: Path, shape: Shape) -> dict[str, int]:
    """The `sizes` of a result, without weights; tokenizer, configuration and an image are written to `folder`."""
    config = bench_model.config_of(shape, bench_model.write_processor(folder))
    config.save_pretrained(folder)
    model = without_weights(config)
    builder = PromptBuilder(model, family_of(model), load_processor(folder))
    return of(shape, bench_model.prompt_of(folder, builder, shape, 0), model)


def of(shape: Shape, prompt: Prompt, model: Any) -> dict[str, int]:
    """The `sizes` of a result; `prompt` is one of `PROMPTS`, which are equally long."""
    return {
        "prompts": PROMPTS,
        "num_generations": shape.num_generations,
        "image_tokens": (shape.image_px // 28) ** 2,
        "prompt_tokens": len(prompt.input_ids),
        "completion_tokens": shape.completion_length,
        "parameters": count(shape, model),
    }
