"""The parts of `gpu.py` that train, and the table of all parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from benchmarks import model as bench_model
from benchmarks.gpu_parts import Note, attention, imports, ops, tests
from benchmarks.harness import MIB
from benchmarks.model import SHAPES, Shape
from benchmarks.planned import planned_phases, step_settings

CAP_GIB = 79.6  # an H100 of 80 GB reports 79.65 GiB
UPDATES = 3
LOGGED = ("seconds/", "memory/", "rollout/", "gpu/", "update/", "tokens_per_second", "grad_norm", "loss", "kl")


def step3b(note: Note, device: str, tiny: bool) -> None:
    """Decoding by batch size, and updates, at 3B with float32 masters: the precision of the recipes."""
    shape, settings = SHAPES["tiny" if tiny else "3b"], {"bf16": True, "beta": 0.04, "optim": "adamw_torch_fused"}
    if not tiny:
        settings |= {"prompts_per_device": 5, "max_completion_length": 256}
    with TemporaryDirectory() as name:
        model, processor = _built(note, Path(name), shape, device)
        for groups, graphs in ((1, False),) if device == "cpu" else ((2, True), (8, True), (2, False)):
            with note.attempt(f"decode {groups} groups"):
                found = decode(model, processor, Path(name), shape, groups, graphs, tokens=6 if tiny else 96)
                note(f"decode {groups} groups x {shape.num_generations}, graphs {graphs}", found)
        with note.attempt("updates"):
            updates(note, model, processor, Path(name), shape, settings, device)


def _built(note: Note, folder: Path, shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    start = perf_counter()
    built = bench_model.build(folder, shape, device=device, dtype=dtype)
    note("model built, s", round(perf_counter() - start, 1))
    return built


def decode(
    model: Any, processor: Any, folder: Path, shape: Shape, groups: int, graphs: bool, *, tokens: int
) -> dict[str, float]:
    """Figures of the second of two generations by the native engine."""
    from vlmr1.models import family_of
    from vlmr1.rollout import NativeEngine, SamplingSettings

    prompts = bench_model.prompts_of(folder, model, processor, replace(shape, prompts=groups))
    options = {"dtype": torch.bfloat16, "cuda_graphs": graphs, "ignore_eos": True}
    engine = NativeEngine(model, family_of(model), processor.tokenizer, **options)
    for step in range(2):
        engine.generate(prompts, shape.num_generations, SamplingSettings(tokens), step=step)
    stats = asdict(engine.stats)
    return {"ms a decode step": 1e3 * stats["decode_seconds"] / (tokens - 1), **stats}


def updates(
    note: Note, model: Any, processor: Any, folder: Path, shape: Shape, settings: Mapping[str, Any], device: str
) -> None:
    """`UPDATES` steps of `GRPOTrainer.train`: logs of each, and the planned memory beside the measured."""
    from transformers import PrinterCallback

    from vlmr1.config import GRPOConfig
    from vlmr1.grpo.trainer import GRPOTrainer

    given: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "write_report": False, "reward_workers": 0}
    given |= {"max_steps": UPDATES, "logging_steps": 1, "disable_tqdm": True, "memory_by_phase": True}
    given |= {"use_cpu": device == "cpu", **step_settings(shape), **settings}
    config = GRPOConfig(output_dir=str(folder / "output"), **given)
    samples = [bench_model.sample_of(folder, shape, index) for index in range(2 * given["prompts_per_device"])]
    rewards = bench_model.rewards(shape.num_generations)
    trainer: Any = GRPOTrainer(model, config, samples, processor, reward_funcs=[rewards])
    trainer.engine.ignore_eos = True
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    for log in (log for log in trainer.state.log_history if "loss" in log):
        kept = {k: float(f"{v:.4g}") for k, v in log.items() if k.startswith(LOGGED) and isinstance(v, float)}
        note(f"update {log.get('step')}", kept)
    if device == "cuda":
        note("most reserved, GiB", round(torch.cuda.max_memory_reserved() / 2**30, 2))
    tokens = len(trainer.train_dataset[0].input_ids)
    planned = planned_phases(settings, shape, tokens, "cuda" if device == "cuda" else "cpu")
    note("planned MiB by phase", {phase: round(sum(causes.values()) / MIB) for phase, causes in planned.items()})


def cap7b(note: Note, device: str, tiny: bool) -> None:
    """Updates of the whole 7B with a KL in the memory of an H100 of 80 GB; the reference model is in host memory."""
    shape = SHAPES["tiny" if tiny else "7b"]
    settings: dict[str, Any] = {"bf16": True, "beta": 0.04, "reference": "offload"}
    if find_spec("torchao") is not None and device == "cuda":
        settings |= {"model_dtype": "bfloat16", "optim": "adamw_torch_8bit", "stochastic_rounding": True}
    else:
        settings |= {"optim": "sgd"}
        note("precision", "float32 weights and sgd: torchao is not installed, or there is no GPU")
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GIB * 2**30 / total))
    with TemporaryDirectory() as name, note.attempt("updates"):
        dtype = getattr(torch, settings.get("model_dtype", "float32"))
        model, processor = _built(note, Path(name), shape, device, dtype)
        updates(note, model, processor, Path(name), shape, settings, device)


Part = Callable[[Note, str, bool], None]
PARTS: Mapping[str, Part] = {each.__name__: each for each in (imports, ops, step3b, attention, tests, cap7b)}
