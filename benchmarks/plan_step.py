"""One shape of the memory benchmark: a real run of two updates, and the highest memory of each phase of the second."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from benchmarks import model as bench_model
from benchmarks.harness import PeakMemory
from benchmarks.model import BENCH_TEXT, BENCH_VISION, TEXT_3B, TEXT_7B, VISION_3B, VISION_7B, Shape, spread
from vlmr1.config import GRPOConfig
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.models import load_model
from vlmr1.planner.job import Job
from vlmr1.planner.plan import Plan, Planner
from vlmr1.types import Pack, Sample


@dataclass(frozen=True)
class Case:
    """A model shape, an image, and settings of `vlmr1 train`."""

    shape: Shape
    settings: Mapping[str, Any]
    device: str = "cpu"


def case(
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    *,
    image_px: int = 448,
    **settings: Any,
) -> Case:
    """A variation of the bench model; `settings` beyond these defaults."""
    decoder = {**BENCH_TEXT, **(text or {})}
    tower = {**BENCH_VISION, **(vision or {}), "out_hidden_size": decoder["hidden_size"]}
    defaults = {"num_generations": 16, "max_completion_length": 24, "prompts_per_device": 1, "beta": 0.04}
    return Case(Shape(decoder, tower, image_px=image_px), defaults | settings)


WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2}
CASES: dict[str, Case] = {
    "bench": case(prompts_per_device=2),
    "checkpointing": case(gradient_checkpointing=True, prompts_per_device=8),
    "no-reference": case(beta=0.0, skip_zero_advantage=False, prompts_per_device=2),
    "frozen-vision": case(freeze_vision=True, prompts_per_device=4),
    "bf16": case(bf16=True, prompts_per_device=6),
    "bf16-checkpointing": case(WIDE, bf16=True, gradient_checkpointing=True, prompts_per_device=6),
    "wide": case(WIDE, num_generations=8, max_completion_length=48),
    "deep": case({"num_hidden_layers": 12}, image_px=224, prompts_per_device=2),
    "vocabulary": case({"vocab_size": 65536, "tie_word_embeddings": True}, image_px=224, max_completion_length=16),
    "large-image": case({"num_hidden_layers": 2}, image_px=784, num_generations=4),
    "several-packs": case(WIDE, prompts_per_device=4, tokens_per_pack=1300),
    "repeated-prompts": case(share_vision=False, share_prompt=False, num_generations=6),
    "naive": case(share_vision=False, share_prompt=False, pack=False, num_generations=6),
    "group": case({"num_hidden_layers": 4}, num_generations=48, max_completion_length=12, image_px=336),
    "small-checkpointing": case(
        {"vocab_size": 32768},
        image_px=560,
        gradient_checkpointing=True,
        beta=0.0,
        skip_zero_advantage=False,
        max_completion_length=8,
    ),
    "3b": Case(
        Shape(TEXT_3B, VISION_3B, image_px=896),
        {"bf16": True, "gradient_checkpointing": True, "prompts_per_device": 2, "max_completion_length": 256},
        device="cuda",
    ),
    "7b": Case(
        Shape(TEXT_7B, VISION_7B, image_px=896),
        {
            "model_dtype": "bfloat16",
            "bf16": True,
            "optim": "adamw_torch_8bit",
            "stochastic_rounding": True,
            "gradient_checkpointing": True,
            "prompts_per_device": 2,
            "max_completion_length": 256,
            "beta": 0.0,
            "skip_zero_advantage": False,
        },
        device="cuda",
    ),
}
TINY = case({"num_hidden_layers": 2, "vocab_size": 1024}, image_px=112, max_completion_length=4, num_generations=2)


class Measured(GRPOTrainer):
    """Notes the highest memory of each phase since it was last told to forget, in MiB above `before`."""

    before = 0.0
    watched: PeakMemory | None = None

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.peaks: dict[str, float] = {}
        self.phase = ""

    def enter(self, phase: str) -> None:
        """The phase before ends here."""
        if self.watched is not None:
            highest = self.watched.start + self.watched.mib() - self.before
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0.0), highest)
        self.phase, self.watched = phase, PeakMemory() if phase else None

    def rollout(self, prompts: Any) -> Any:
        self.enter("rollout")
        return super().rollout(prompts)

    def with_reference(self, pack: Pack) -> Pack:
        self.enter("reference")
        return super().with_reference(pack)

    def backward(self, model: Any, packs: Any, groups: Any) -> Any:
        self.enter("policy")
        done = super().backward(model, packs, groups)
        self.enter("update")  # clipping and the optimizer
        return done


class SecondUpdate(TrainerCallback):
    """The first update has no optimizer state before its end, and compiles and caches: it is not counted."""

    def __init__(self, trainer: Measured):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.enter("")
        if state.global_step == 1:
            self.trainer.peaks.clear()


def config_of(settings: Mapping[str, Any], folder: Path, device: str) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(folder / "output"),
        use_cpu=device == "cpu",
        max_steps=2,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
        reward_workers=0,
        memory_by_phase=False,  # it would reset the marks that are read here
        write_report=False,
        **settings,
    )


def measured(of: Case, folder: Path, device: str) -> dict[str, float]:
    """Peak of each phase of the second update, MiB above what the process held before it made the model."""
    if device == "cpu":
        run(TINY, folder / "tiny", device, 0.0)  # what is imported or allocated once and for all
    gc.collect()
    return run(of, folder / "measured", device, PeakMemory().start)


def run(of: Case, folder: Path, device: str, before: float) -> dict[str, float]:
    folder.mkdir(parents=True)
    settings = dict(of.settings)
    dtype = getattr(torch, settings.get("model_dtype", "float32"))
    model, processor = bench_model.build(folder, of.shape, device=device, dtype=dtype)
    if settings.get("load_in_4bit"):
        model.save_pretrained(folder / "whole")
        model = load_model(folder / "whole", dtype=dtype, compute_dtype=dtype)
    model.generation_config.eos_token_id = None  # every completion meets the limit
    content = [{"type": "image"}, {"type": "text", "text": "Locate the digit 7"}]
    samples = [
        Sample(
            [{"role": "user", "content": content}], (bench_model.image_of(folder, of.shape, index),), "", "made", index
        )
        for index in range(2 * settings["prompts_per_device"])
    ]
    trainer = Measured(model, config_of(settings, folder, device), samples, processor, reward_funcs=[spread])
    trainer.before = before
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(SecondUpdate(trainer))
    prompts: Any = trainer.train_dataset
    trainer.train()
    return trainer.peaks | {"prompt_tokens": float(len(prompts[0].input_ids))}


def planned(of: Case, prompt_tokens: int, folder: Path, device: str) -> Plan:
    """What the planner says of the same job."""
    image_tokens = (of.shape.image_px // 28) ** 2
    config = config_of(of.settings, folder, "cpu")  # a GPU setting is no matter of the machine that plans
    model = bench_model.config_of(of.shape, bench_model.write_processor(folder))
    job = {"device": device, "image_tokens": image_tokens, "text_tokens": prompt_tokens - image_tokens}
    return Planner().plan(Job(config, model, **job))
