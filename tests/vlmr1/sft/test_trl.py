"""TRL's own SFTTrainer on the same rows: losses, metrics and weights of accumulated updates; and a script of TRL that
runs with another import."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vlmr1
from tests.helpers.answers import assert_moved_alike
from tests.helpers.api import tiny
from vlmr1.models import load_model, load_processor

__all__ = ["tiny"]
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
SIZES = ((84, 56), (56, 56), (112, 84))


def rows(count: int) -> list[dict[str, Any]]:
    """Prompts with one image, two or none, some with a message of the system; answers of 1 to 34 words."""
    random = np.random.default_rng(0)
    found = []
    for place in range(count):
        pixels = [random.integers(0, 255, (*SIZES[(place + i) % 3], 3), dtype=np.uint8) for i in range(place % 3)]
        prompt = [{"role": "user", "content": f"Where is {place}?"}]
        if place % 4 == 1:
            prompt.insert(0, {"role": "system", "content": "Answer briefly."})
        answer = " ".join(f"{place}, {word}" for word in range(1 + place * 11 % 34))
        completion = [{"role": "assistant", "content": answer}]
        found.append({"prompt": prompt, "completion": completion, "images": list(map(Image.fromarray, pixels))})
    return found


def trained(kind: Any, tiny: Path, output: Path, **given: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Logs and weights of three updates of two passes of two rows by the trainer of a library."""
    known: dict[str, Any] = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
    known |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1, logging_steps=1)
    known |= dict(optim="sgd", learning_rate=0.5, gradient_checkpointing=False, max_length=150)
    model = load_model(tiny)
    trainer = kind.SFTTrainer(
        model=model,
        args=kind.SFTConfig(str(output), **known | given),
        train_dataset=datasets.Dataset.from_list(rows(12)),
        processing_class=load_processor(tiny),
    )
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log], dict(model.named_parameters())


def test_accumulated_updates_are_those_of_trl(tiny, tmp_path):
    (theirs, expected), (ours, found) = (trained(kind, tiny, tmp_path) for kind in (trl, vlmr1))
    assert len(theirs) == len(ours) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert {name: one[name] for name in other} == pytest.approx(other, rel=1e-5)
    assert ours[0]["truncated"] + ours[1]["truncated"] + ours[2]["truncated"] > 0
    start = dict(load_model(tiny).named_parameters())
    assert_moved_alike(found, expected, start)
    assert not any(torch.equal(found[name], start[name]) for name in start)
