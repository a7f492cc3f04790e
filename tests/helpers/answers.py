"""Rows with answers, their supervised update, and the plain cross-entropy of one sequence at a time."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from tests.helpers.updates import Step, backward
from vlmr1.config import SFTConfig
from vlmr1.sft.trainer import SFTTrainer
from vlmr1.types import Sample


def sample(index: int, text: str, images: Sequence[Path], *answers: str) -> Sample:
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
    first, *others = answers
    message = {"role": "user", "content": content}
    return Sample([message], tuple(images), first, f"rows.jsonl:{index + 1}", index, {}, tuple(others))


def trainer_of(model: Any, processor: Any, output: Path, samples: Sequence[Sample], **settings: Any) -> SFTTrainer:
    """A trainer of a copy of the model."""
    config = SFTConfig(output_dir=str(output), use_cpu=True, **settings)
    trainer = SFTTrainer(copy.deepcopy(model), config, samples, processor)
    trainer.accelerator.prepare(trainer.model)
    return trainer


def update(trainer: SFTTrainer) -> Step:
    """Loss, metrics and gradients of an update on all rows of a trainer."""
    return backward(trainer, [trainer.train_dataset[place] for place in range(len(trainer.train_dataset))])


def plain(model: Any, processor: Any, samples: Sequence[Sample]) -> Step:
    """The same by the model's own forward on each sequence alone: prompt, answer, what the chat template adds."""
    model = copy.deepcopy(model).train()
    losses, right, tokens = [], 0, 0
    for each in samples:
        for answer in (each.solution, *each.other_solutions):
            turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            prompt = processor.apply_chat_template(each.messages, tokenize=False, add_generation_prompt=True)
            whole = processor.apply_chat_template([*each.messages, turn], tokenize=False)
            images = [Image.open(path).convert("RGB") for path in each.images]
            inputs = processor(text=[prompt], images=images or None, return_tensors="pt")
            ids = processor.tokenizer(whole[len(prompt) :], add_special_tokens=False, return_tensors="pt").input_ids
            for name, more in (("input_ids", ids), ("attention_mask", torch.ones_like(ids))):
                inputs[name] = torch.cat([inputs[name], more], 1)
            if "mm_token_type_ids" in inputs:
                kinds = inputs["mm_token_type_ids"]
                inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(ids, dtype=kinds.dtype)], 1)
            logits = model(**inputs).logits[0, -ids.shape[1] - 1 : -1]
            losses.append(cross_entropy(logits, ids[0], reduction="sum"))
            right += int((logits.argmax(-1) == ids[0]).sum())
            tokens += ids.shape[1]
    loss = torch.stack(losses).sum() / tokens
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), {"mean_token_accuracy": right / tokens, "tokens": float(tokens)}, gradients
