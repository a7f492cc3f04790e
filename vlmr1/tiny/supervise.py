"""How the shipped checkpoint was made: `python -m vlmr1.tiny.supervise --out vlmr1/tiny/checkpoint`.

Supervised training on canvases drawn without end. The boxes it learns from are jittered as annotators jitter,
every second edge by 14 px; the GRPO reward knows the exact box, so this is what the policy can still learn.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmr1.data.templates import REC_QUESTION
from vlmr1.tiny import digits

JITTER = {-1: 0.25, 0: 0.5, 1: 0.25}  # in steps of 14 px

ROWS = ("upper", "middle", "lower")
COLUMNS = ("left", "center", "right")


def jittered(canvas: digits.Canvas, which: int, rng: np.random.Generator) -> digits.Box:
    """The box of one digit as an annotator would have drawn it, inside the canvas."""
    off = rng.choice(list(JITTER), size=4, p=list(JITTER.values())) * digits.STEP
    edges = np.clip(np.array(canvas.boxes[which]) + off, 0, canvas.pixels.shape[0])
    x1, y1, x2, y2 = (int(edge) for edge in edges)
    return x1, y1, x2, y2


def prompt_text(label: int) -> str:
    return REC_QUESTION.format(question=digits.question(label))


def completion_text(canvas: digits.Canvas, which: int, box: digits.Box) -> str:
    """A short thought (which digits are where, in reading order), then the answer."""
    size = canvas.pixels.shape[0]
    seen = sorted((*_cell(seen_at, size), label) for seen_at, label in zip(canvas.boxes, canvas.labels, strict=True))
    thought = ", ".join(f"{ROWS[row]} {COLUMNS[column]} {label}" for row, column, label in seen)
    answer = digits.answer(box, canvas.labels[which])
    return f"<think>\nI see {thought}.\n</think>\n<answer>\n{answer}\n</answer>"


def _cell(box: digits.Box, size: int) -> tuple[int, int]:
    """Row and column, each 0 to 2, of a box's center."""
    x1, y1, x2, y2 = box
    return min(2, 3 * (y1 + y2) // (2 * size)), min(2, 3 * (x1 + x2) // (2 * size))


def batch_of(model, processor, rng: np.random.Generator, canvases: int) -> dict:
    """Inputs of the model for one right-padded batch: every digit of each canvas asked for, each canvas encoded
    once; labels on the completion only."""
    drawn = [digits.draw(rng, "train") for _ in range(canvases)]
    images = processor.image_processor([canvas.pixels for canvas in drawn], return_tensors="pt")
    encoded = model.model.get_image_features(images["pixel_values"], images["image_grid_thw"])
    merged = (images["image_grid_thw"].prod(-1) // processor.image_processor.merge_size**2).tolist()
    texts, lengths, of_row = [], [], []
    for i, canvas in enumerate(drawn):
        for which, label in enumerate(canvas.labels):
            completion = completion_text(canvas, which, jittered(canvas, which, rng)) + processor.tokenizer.eos_token
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


def make_optimizers(model: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    chosen = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inside, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def supervise(start: Path, out: Path, *, seconds: float, canvases: int, learning_rate: float, seed: int) -> None:
    """Muon and AdamW, linear warm-up and cosine decay over a time budget; writes bfloat16 safetensors."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from vlmr1.models.processor import load_processor

    processor = load_processor(start)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    model.train()
    optimizers = make_optimizers(model, learning_rate)
    rng = np.random.default_rng(seed)
    begin, step, mean = time.monotonic(), 0, None
    while (elapsed := time.monotonic() - begin) < seconds:
        warm_up = min(1.0, (step + 1) / 200)
        decay = 0.5 * (1 + np.cos(np.pi * elapsed / seconds))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warm_up * max(decay, 0.01)
        loss = model(**batch_of(model, processor, rng, canvases)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            print(f"step {step}  {elapsed:.0f} s  loss {mean:.4f}", flush=True)
            save(model, processor, out)
    save(model, processor, out)


def save(model, processor, out: Path) -> None:
    processor.tokenizer.save_pretrained(out)
    processor.image_processor.save_pretrained(out)
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.config.dtype = torch.bfloat16  # of the file; here the weights stay float32
    model.save_pretrained(out, state_dict=state)


def main() -> None:
    from vlmr1.tiny.build import build

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="continue from this checkpoint instead of random weights")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--canvases", type=int, default=16, help="a step")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = args.start or build(args.out, args.seed)
    supervise(
        start,
        args.out,
        seconds=args.seconds,
        canvases=args.canvases,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
