"""Scripts of the Python API in processes of their own: killed and started again, and launched as two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.two_ranks import ROOT, assert_close, computed

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "tests" / "helpers" / "api_script.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TWO_UPDATES: dict[str, Any] = dict(max_steps=2, beta=0.1)
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def run(output: Path, model: Path, launcher: list[str] | None = None, **settings: Any) -> int:
    """Run the script, with the words of a launcher between Python and it; return its exit status."""
    words = [sys.executable, *(launcher or []), str(SCRIPT), str(output), str(model), json.dumps(settings)]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env={**os.environ, **paths}, capture_output=True, text=True, timeout=600)
    print(done.stdout[-3000:], done.stderr[-5000:])  # shown where a test fails
    return done.returncode


def logged(checkpoint: Path) -> list[dict[str, float]]:
    """Values in the log of a run that were not measured."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    measured = ("memory", "step_time", "rollout/", "_per_")
    return [{k: v for k, v in line.items() if not any(word in k for word in measured)} for line in computed(history)]


def test_a_run_with_an_adapter_goes_on_after_sigkill_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    """Weights, optimizer, schedule, metrics. The kill is in the middle of a generation of two updates, a step after a
    checkpoint that was written there too."""
    settings: dict[str, Any] = dict(max_steps=6, save_steps=3, num_iterations=2, beta=0.1, lora_dropout=0.05)
    assert run(tmp_path / "whole", tiny, **settings) == 0
    assert run(tmp_path / "killed", tiny, **settings, kill=4) == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-3"]
    assert run(tmp_path / "killed", tiny, **settings, resume=True) == 0
    whole, again = (tmp_path / name / "checkpoint-6" for name in ("whole", "killed"))
    for name in ("adapter_model.safetensors", "../final/adapter_model.safetensors"):
        one, other = load_file(whole / name), load_file(again / name)
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    for name in ("optimizer.pt", "scheduler.pt"):
        assert flat(torch.load(whole / name)) == flat(torch.load(again / name))
    assert logged(again) == logged(whole) and len(logged(whole)) == 6


def flat(state: Any) -> Any:
    if isinstance(state, dict):
        return {name: flat(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return [flat(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of one process with the batches of two."""
    output = tmp_path_factory.mktemp("alone")
    assert run(output, tiny, **TWO_UPDATES, per_device_train_batch_size=8) == 0
    return output / "checkpoint-2"


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_ranks_train_as_one_with_the_batches_of_both(
    launcher: list[str], alone: Path, tiny: Path, tmp_path: Path
) -> None:
    assert run(tmp_path, tiny, launcher, **TWO_UPDATES) == 0
    two = tmp_path / "checkpoint-2"
    assert_close(load_file(two / "model.safetensors"), load_file(alone / "model.safetensors"))
    names = ("loss", "grad_norm", "reward", "reward_std", "kl", "num_tokens", "completions/mean_length")
    for line, expected in zip(logged(two), logged(alone), strict=True):
        assert [line[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-4, abs=1e-8)
