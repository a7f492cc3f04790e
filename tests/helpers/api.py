"""Tiny runs of the Python API: a checkpoint, rows with images, and a trainer as a script makes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlmr1
from tests.helpers.families import build
from vlmr1.models.processor import load_processor


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint of Qwen2.5-VL."""
    return build("qwen2_5_vl", tmp_path_factory.mktemp("api") / "tiny")


def rows(count: int = 8, **more: Any) -> list[dict[str, Any]]:
    """Rows with an image each; `more` are columns by a function of the place."""
    noise = np.random.default_rng(0).integers(0, 255, (count, 56, 84, 3), dtype=np.uint8)
    found = []
    for i, pixels in enumerate(noise):
        prompt = [{"role": "user", "content": f"Where is {i}?"}]
        others = {name: value(i) for name, value in more.items()}
        found.append({"prompt": prompt, "image": Image.fromarray(pixels), "place": i} | others)
    return found


def sums(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def settings_of(output: Path, **given: Any) -> Any:
    """Two prompts of two completions an update, two updates."""
    known: dict[str, Any] = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
    known |= dict(num_generations=2, per_device_train_batch_size=4, max_steps=2, max_completion_length=6)
    known |= dict(learning_rate=1e-2, logging_steps=1, gradient_checkpointing=False)
    return vlmr1.GRPOConfig(str(output), **known | given)


def trainer_of(tiny: Path, output: Path, given: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A trainer; `given` are arguments of its constructor that replace the usual ones."""
    arguments: dict[str, Any] = dict(model=str(tiny), reward_funcs=sums, train_dataset=rows())
    arguments |= dict(args=settings_of(output, **settings), processing_class=load_processor(tiny))
    return vlmr1.GRPOTrainer(**arguments | (given or {}))
