"""Peak memory of an arm before it runs: the one place where the benchmarks call the planner of `vlmr1`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from benchmarks import model as bench_model
from benchmarks.model import Shape
from vlmr1.config import GRPOConfig
from vlmr1.planner.job import Job
from vlmr1.planner.plan import Planner
from vlmr1_kernels import use

ALWAYS = ("weights", "optimizer", "reference model", "framework")  # causes that are there throughout a step


def planned_phases(
    settings: Mapping[str, Any], shape: Shape, prompt_tokens: int, device: Literal["cpu", "cuda"]
) -> dict[str, dict[str, int]]:
    """Bytes by phase and cause that one step takes, as `vlmr1 plan` counts them: it runs the trainer's passes without
    data, here with the arm's kernels, so that the reference attention's dense masks count. CUDA has its own account."""
    with TemporaryDirectory() as folder:
        model = bench_model.config_of(shape, bench_model.write_processor(Path(folder)))
        given: dict[str, Any] = {"use_cpu": True, "report_to": "none", **step_settings(shape), **settings}
        config = GRPOConfig(output_dir=folder, **given)
    job = {"image_tokens": shape.image_tokens, "text_tokens": prompt_tokens - shape.image_tokens}
    with use(settings.get("kernels", "") if device == "cpu" else ""):
        plan = Planner().plan(Job(config, model, device=device, **job))
    return {phase: dict(causes) for phase, causes in plan.phases.items()}


def step_settings(shape: Shape) -> dict[str, Any]:
    """The settings that a shape fixes."""
    return {
        "num_generations": shape.num_generations,
        "prompts_per_device": shape.prompts,
        "max_completion_length": shape.completion_length,
        "gradient_checkpointing": shape.checkpointing,
    }


def peak_bytes(phases: Mapping[str, Mapping[str, int]]) -> int:
    """The planned peak of the step."""
    return max(sum(causes.values()) for causes in phases.values())


def beyond_held(phases: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Planned bytes of each phase beyond what a process holds between steps."""
    return {phase: sum(v for cause, v in causes.items() if cause not in ALWAYS) for phase, causes in phases.items()}
