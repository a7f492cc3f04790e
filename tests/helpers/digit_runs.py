"""Short runs of the tiny model on eight drawn digits, in this process or in one of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

STEPS = 6
FAULTS = Path(__file__).parents[1] / "golden" / "faults"


def command(data: Path, output: Path, *more: str) -> list[str]:
    """A short run: 2 prompts a step, so that 6 steps are an epoch and a half."""
    settings = {
        "data_file_paths": data / "train.jsonl",
        "image_folders": data / "images",
        "output_dir": output,
        "max_steps": STEPS,
        "save_steps": 2,
        "prompts_per_device": 2,
        "num_generations": 3,
        "max_completion_length": 32,
        "use_cpu": "true",
        "warmup_steps": 0,
    }
    words = [str(word) for name, value in settings.items() if f"--{name}" not in more for word in (f"--{name}", value)]
    return ["train", "--recipe", "tiny-digits", *words, *more]


def start_with(words: list[str], kill_before: int | None = None) -> subprocess.Popen:
    """`kill_before`: the process ends before this step of the optimizer, with status 9."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    if kill_before is not None:
        paths = [str(FAULTS), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "GOLDEN_FAULTS": json.dumps({"kill": [kill_before]})}
    return subprocess.Popen(
        [sys.executable, "-m", "vlmr1.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def weights(output: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step}" / "model.safetensors")
