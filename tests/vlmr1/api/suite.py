"""Models, rows, rewards and trainers of the conformance suite, which `test_trl_conformance.py` describes."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.vlmr1.api.suite_models import CHATML, FAMILIES, QWEN, Family, build, text, tokenizer, with_parts
from vlmr1.errors import UserError
from vlmr1.models.processor import load_processor

datasets = pytest.importorskip("datasets")
TRAINER = os.environ.get("TRAINER", "vlmr1")
OURS = TRAINER != "trl"
trl = importlib.import_module(TRAINER)
CLEAR = (ValueError, NotImplementedError, UserError)  # an error that was meant
MODELS = TemporaryDirectory()
MAIN, SUPPORTED = "qwen2_5_vl", ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "internvl")
LLAVA = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<image>")
ENDS = range(7, 107)  # tokens of Qwen's tiny tokenizer that are no special ones


def llava(ids: dict[str, int]) -> Any:
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, projection_dim=32)
    vision = dict(model_type="clip_vision_model", image_size=56, patch_size=14, **sizes)
    known: Any = dict(image_token_id=ids["<image>"], image_seq_length=16, vision_config=vision)
    return transformers.LlavaConfig(text_config=text(ids, LLAVA, model_type="llama"), **known)


SIDES: Any = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
PATCHES: Any = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
TEMPLATE = with_parts(CHATML, "<image>\n")
FAMILIES["llava"] = Family(llava, LLAVA, TEMPLATE, lambda: CLIPImageProcessorPil(**SIDES), settings=PATCHES)


def picture(seed: int, size: tuple[int, int] = (84, 56)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def row_of(i: int, kind: str) -> dict[str, Any]:
    """A row in TRL's format; `kind` is how it holds its images."""
    question = f"Where is {i}?"
    prompt: list[dict[str, Any]] = [{"role": "user", "content": question}]
    if kind == "bare":
        return {"prompt": question, "place": i}
    if kind == "placeholders":
        parts = [{"type": "text", "text": "First "}, {"type": "image"}, {"type": "text", "text": question}]
        system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
        return {"prompt": [system, {"role": "user", "content": parts}], "images": [picture(i)], "place": i}
    if kind == "within":
        prompt[0]["content"] = [{"type": "image", "image": picture(i)}, {"type": "text", "text": question}]
    images = {"image": {"image": picture(i)}, "images": {"images": [picture(i), picture(i + 100, (56, 56))]}}
    images |= {"batches": {"images": [picture(i)] * (i // 2 % 2)}, "mixed": {"images": [picture(i)] * (i % 2)}}
    return {"prompt": prompt, "place": i} | images.get(kind, {})


def rows_of(kind: str = "image", count: int = 8, **more: Any) -> Any:
    """A data set; `more` are columns by a function of the place."""
    rows = [row_of(i, kind) | {name: value(i) for name, value in more.items()} for i in range(count)]
    if kind != "within":
        return datasets.Dataset.from_list(rows)
    part = dict(type=datasets.Value("string"), text=datasets.Value("string"), image=datasets.Image())
    prompt = datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})
    return datasets.Dataset.from_list(rows, features=datasets.Features(prompt=prompt, place=datasets.Value("int64")))


def recorder(score: Callable[[list[int]], float] = lambda ids: float(sum(ids) % 7)) -> Any:
    """The reward `score`, of the token ids that keeps what each call was given, and what it gave, in `calls`."""
    calls = []

    def reward(prompts: list, completions: list, completion_ids: list, **more: Any) -> list[float]:
        values = [score(ids) for ids in completion_ids]
        given = dict(prompts=prompts, completions=completions, ids=completion_ids, more=more, values=values)
        calls.append(SimpleNamespace(**given, step=more["trainer_state"].global_step))
        return values

    reward.calls = calls  # type: ignore[attr-defined]
    return named("score", reward)


def named(name: str, reward: Any) -> Any:
    reward.__name__ = name
    return reward


def constant(value: float, name: str) -> Any:
    return named(name, lambda completions, **_: [value] * len(completions))


def config(output: Path, **settings: Any) -> Any:
    """Two prompts a step, two completions each, two steps; as a script would set it."""
    given: dict[str, Any] = dict(output_dir=str(output), per_device_train_batch_size=4, num_generations=2, max_steps=2)
    given |= dict(max_completion_length=6, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none")
    return trl.GRPOConfig(**given | dict(use_cpu=True, bf16=False) | settings)


@cache
def folder_of(family: str) -> Path:
    """The checkpoint of a family; "judge" is a sequence classifier with one label."""
    place = Path(MODELS.name) / family
    if family != "judge":
        return build(family, place)
    tokens = tokenizer(FAMILIES[MAIN])
    known = transformers.Qwen2Config(**text(tokens.get_vocab(), QWEN, num_hidden_layers=1), num_labels=1)  # type: ignore
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(known).save_pretrained(place)
    tokens.save_pretrained(place)
    return place


@dataclass
class Kit:
    """Makes models and trainers; `output` is the directory of runs."""

    output: Path

    def model(self, family: str = MAIN) -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder_of(family), dtype=torch.float32)

    def ending(self) -> Any:  # at any of a hundred tokens, a quarter of all
        model = self.model()
        model.generation_config.eos_token_id = list(ENDS)
        return model

    def processor(self, family: str = MAIN) -> Any:
        return load_processor(folder_of(family))

    def trainer(self, reward: Any = None, data: Any = None, given: Any = None, **settings: Any) -> Any:
        """`given` are arguments of the constructor that replace those that most scripts pass."""
        arguments = dict(model=str(folder_of(MAIN)), processing_class=self.processor())
        arguments |= dict(reward_funcs=reward or recorder(), args=config(self.output, **settings))
        arguments |= dict(train_dataset=rows_of() if data is None else data) | (given or {})
        return trl.GRPOTrainer(**{name: value for name, value in arguments.items() if value is not None})


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path / "run")


def refused(name: str | None) -> Any:
    """The drop-in does not have what the block asks for: there it must end in an error that names it."""
    return nullcontext() if name is None or not OURS else pytest.raises(CLEAR, match=name)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(trainer: Any, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that are not what they were."""
    now = weights(trainer.model)
    assert all(bool(value.isfinite().all()) for value in now.values())
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


def trained(trainer: Any) -> set[str]:
    """Train to the end; the names of what moved."""
    before = weights(trainer.model)
    result = trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps and np.isfinite(result.training_loss)
    assert np.isfinite(trainer.state.log_history[-1]["train_loss"])
    return moved(trainer, before)


def logged(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def table(output: Path) -> list[dict[str, Any]]:
    """The completions that a run has logged, in whichever of the two forms."""
    files = map(str, sorted((output / "completions").glob("*.parquet")))
    rows = [row for file in files for row in datasets.Dataset.from_parquet(file)]
    return rows or [json.loads(line) for line in (output / "completions.jsonl").read_text().splitlines()]


def is_vision(name: str) -> bool:
    return any(part in name for part in ("visual", "vision", "connector", "projector"))
