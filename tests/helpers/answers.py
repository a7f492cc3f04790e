"""Rows with answers, their supervised update, the plain cross-entropy of one sequence at a time, and short runs."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from tests.helpers.two_ranks import Weights
from tests.helpers.updates import Step, backward
from vlmr1.config import SFTConfig
from vlmr1.rollout.stop_tokens import end_of_turn, stop_token_ids
from vlmr1.sft.trainer import SFTTrainer
from vlmr1.tiny import digits
from vlmr1.types import Sample

STEPS = 6


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
    """The update by the model's own forward on each sequence alone: prompt, answer, what the chat template adds, and
    the token that ends a turn where it adds none."""
    ends = stop_token_ids(model, processor.tokenizer, processor.chat_template)
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
            if not ends.intersection(ids[0].tolist()):
                ids = torch.tensor([[*ids[0], *end_of_turn(processor.tokenizer, processor.chat_template)]])
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


@torch.no_grad()
def assert_moved_alike(found: Weights, expected: Weights, start: Weights) -> None:
    """Weights are equal to 1e-5 of each tensor's largest entry, and their changes since `start` to 2e-5 of the
    norm of all."""
    assert found.keys() == expected.keys()
    moved = {name: value - start.get(name, 0) for name, value in expected.items()}
    errors = {name: found[name] - value for name, value in expected.items()}
    for name, value in expected.items():
        assert moved[name].norm() > 0 and errors[name].abs().max() <= 1e-5 * value.abs().max(), name
    way, error = (float(torch.stack([each.norm() for each in of.values()]).norm()) for of in (moved, errors))
    assert error <= 2e-5 * way and way > 1e-3, (error, way)


def write_rows(folder: Path, count: int = 8) -> Path:
    """Drawn digits with a column `response`: two answers in every other row."""
    path = digits.write(folder, "train", count, seed=3)
    lines = []
    for place, line in enumerate(path.read_text().splitlines()):
        row = json.loads(line)
        thought = f"<think>\nI see.\n</think>\n{row['conversations'][1]['value']}"
        lines.append(json.dumps(row | {"response": [thought, "<answer>no</answer>"] if place % 2 else thought}))
    path.write_text("\n".join(lines) + "\n")
    return folder


def command(data: Path, output: Path, *more: str) -> list[str]:
    """A run of an epoch and a half, two rows an update."""
    settings = {"data_file_paths": data / "train.jsonl", "image_folders": data / "images", "output_dir": output}
    settings |= {"model_name_or_path": "tiny", "question_template": "rec", "max_steps": STEPS, "save_steps": 2}
    settings |= {"prompts_per_device": 2, "learning_rate": 4e-4, "use_cpu": "true", "write_report": "false"}
    words = [str(word) for name, value in settings.items() if f"--{name}" not in more for word in (f"--{name}", value)]
    return ["sft", *words, *more]
