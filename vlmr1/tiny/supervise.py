"""Supervised training of the shipped checkpoint: `python -m vlmr1.tiny.supervise --out FOLDER`.

Two stages from random weights: labels with jittered edges, which teach the task, and then 300 steps on sloppy labels
(`texts.py`), which leave GRPO something to recover. The seeds of the shipped checkpoint are 0
and 3.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmr1.models import load_model, load_processor
from vlmr1.models.processor import save_processor
from vlmr1.tiny import digits
from vlmr1.tiny.build import build
from vlmr1.tiny.texts import Box, Canvas, completion_text, exact, jittered, prompt_text, sloppy

Label = Callable[[Canvas, int, np.random.Generator], Box]


@dataclass(frozen=True)
class Stage:
    """One supervised training run: linear warm-up, then a cosine to 1% of the learning rate."""

    label: Label
    steps: int
    canvases: int  # a step
    learning_rate: float
    warm_up: int
    muon: bool  # for the matrices inside the blocks; AdamW has the rest, or all


STAGES = {
    "jittered": Stage(jittered, steps=2365, canvases=16, learning_rate=2e-3, warm_up=200, muon=True),
    "sloppy": Stage(sloppy, steps=300, canvases=8, learning_rate=4e-4, warm_up=20, muon=False),
    "exact": Stage(exact, steps=300, canvases=8, learning_rate=4e-4, warm_up=20, muon=False),
}


def batch_of(model: Any, processor: Any, stage: Stage, rng: np.random.Generator) -> dict:
    """Return the model's inputs for one right-padded batch: a question for each digit, each canvas encoded once.

    Labels are on the completions only."""
    drawn = [digits.draw(rng, "train") for _ in range(stage.canvases)]
    images = processor.image_processor([canvas.pixels for canvas in drawn], return_tensors="pt")
    encoded = model.model.get_image_features(images["pixel_values"], images["image_grid_thw"])
    merged = (images["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2).tolist()
    texts, lengths, of_row = [], [], []
    for i, canvas in enumerate(drawn):
        for which, label in enumerate(canvas.labels):
            completion = completion_text(canvas, which, stage.label(canvas, which, rng)) + processor.tokenizer.eos_token
            content = [{"type": "image"}, {"type": "text", "text": prompt_text(label)}]
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            texts.append(prompt.replace(processor.image_token, processor.image_token * merged[i]) + completion)
            lengths.append(len(processor.tokenizer(completion).input_ids))
            of_row.append(i)
    batch = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ends = batch["attention_mask"].sum(-1, keepdim=True)
    place = torch.arange(batch["input_ids"].shape[1])[None]
    supervised = (place < ends) & (place >= ends - torch.tensor(lengths)[:, None])
    features = BaseModelOutputWithPooling(pooler_output=[encoded.pooler_output[i] for i in of_row])  # type: ignore[arg-type]
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "image_grid_thw": images["image_grid_thw"][of_row],
        "mm_token_type_ids": (batch["input_ids"] == processor.image_token_id).int(),
        "mm_encoder_outputs": {"image": features},
        "labels": batch["input_ids"].masked_fill(~supervised, -100),
    }


def make_optimizers(model: torch.nn.Module, stage: Stage) -> list[torch.optim.Optimizer]:
    inside = [p for name, p in model.named_parameters() if stage.muon and p.ndim == 2 and "embed_tokens" not in name]
    chosen = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = []
    if inside:
        made.append(torch.optim.Muon(inside, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return [*made, torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)]


def supervise(start: Path, out: Path, stage: Stage, seed: int) -> None:
    """Train one stage and write bfloat16 safetensors."""
    processor = load_processor(start)
    model: Any = load_model(start)
    model.train()
    optimizers = make_optimizers(model, stage)
    rng = np.random.default_rng(seed)
    mean = 0.0
    for step in range(stage.steps):
        warm_up = min(1.0, (step + 1) / stage.warm_up)
        decay = max(0.01, 0.5 * (1 + np.cos(np.pi * step / stage.steps)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * warm_up * decay
        loss = model(**batch_of(model, processor, stage, rng)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        mean = loss.item() if step == 0 else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {stage.steps}  loss {mean:.4f}", flush=True)
    save(model, processor, out)


def save(model: Any, processor: Any, out: Path) -> None:
    save_processor(processor, out)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.config.dtype = torch.bfloat16  # for the file; here the weights stay float32
    model.save_pretrained(out, state_dict=state)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="continue from this checkpoint instead of random weights")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=["jittered", "sloppy"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 3], help="one for each stage")
    args = parser.parse_args(words)
    start = args.start or build(args.out, args.seeds[0])
    for name, seed in zip(args.stages, args.seeds, strict=True):
        supervise(start, args.out, STAGES[name], seed)
        start = args.out


if __name__ == "__main__":
    main()
