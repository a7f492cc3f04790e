"""Runs of two processes (gloo, CPU) as `vlmr1 train --launch` starts them, and what they are compared by."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmr1.commands.arguments import parse_config
from vlmr1.commands.train import train
from vlmr1.distributed.launch import launch_command

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
ROOT = Path(__file__).parents[2]
ROWS = 8
UPDATES = 4
SETTINGS = {
    "model_name_or_path": "tiny",
    "accu_reward_method": "default",
    "num_generations": 3,
    "max_completion_length": 8,
    "max_steps": UPDATES,
    "steps_per_generation": 2,
    "save_steps": 3,  # in the middle of a generation
    "learning_rate": 1e-4,
    "reward_workers": 0,
    "question_template": "none",
    "disable_tqdm": "true",
    "write_report": "false",
}


def words(folder: Path, output: Path, **more: Any) -> list[str]:
    settings = SETTINGS | {
        "data_file_paths": folder / "data.jsonl",
        "image_folders": folder,
        "reward_funcs": f"{folder / 'reward.py'}:noise",
        "output_dir": output,
    }
    return [word for name, value in (settings | more).items() for word in (f"--{name}", str(value))]


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def evaluations(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "eval.jsonl").read_text(encoding="utf-8").splitlines()]


def computed(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    """What of the metrics of each step was not measured."""
    measured = ("second", "memory", "runtime")
    return [{k: v for k, v in step.items() if not any(word in k for word in measured)} for step in steps]


def run_alone(folder: Path, output: Path, **more: Any) -> list[dict[str, float]]:
    """The metrics of one process with the prompts of both."""
    train(parse_config(words(folder, output, prompts_per_device=2, use_cpu="true", **more)))
    return metrics(output)


def two_ranks(engine: str, arguments: list[str]) -> subprocess.CompletedProcess:
    """As `vlmr1 train --launch` runs it."""
    environment, command = launch_command(engine, 2, arguments)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **environment, **paths}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=ROOT)


def resumable(run: Path, copy: Path, update: int = 3) -> Path:
    """Files left of a run that was killed behind this update."""
    shutil.copytree(run / f"checkpoint-{update}", copy / f"checkpoint-{update}")
    for name in ("settings.json", "metrics.jsonl", "completions.jsonl"):
        shutil.copy(run / name, copy / name)
    return copy


def run_launched(engine: str, folder: Path, output: Path, **more: Any) -> list[dict[str, float]]:
    done = two_ranks(engine, words(folder, output, prompts_per_device=1, **more))
    assert done.returncode == 0, done.stderr[-3000:]
    return metrics(output)


Weights = dict[str, torch.Tensor]


def assert_close(found: Weights, expected: Weights, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)  # which names what differs


def assert_moved(found: Weights, expected: Weights) -> None:
    """Each layer of an adapter has moved as far: its B, which begins as zeros."""
    for name in (name for name in expected if "lora_B" in name):
        assert expected[name].norm() > 1e-5, name
        assert (found[name] - expected[name]).norm() <= 1e-2 * expected[name].norm(), name


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    names = ("loss", "grad_norm", "reward", "kl", "entropy", "tokens", "completion_length", "zero_variance_groups")
    for one, other in zip(found, expected, strict=True):
        for name in names:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), (name, one["step"])
