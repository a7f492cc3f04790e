"""Short runs of the tiny model on eight drawn digits."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

STEPS = 6
EVERYTHING = {"beta": 1.0, "freeze_vision": "false", "learning_rate": 6e-5}  # the reference and the tower take part too


def command(data: Path, output: Path, *more: str, **given: Any) -> list[str]:
    """A short run: 2 prompts a step, so that 6 steps are an epoch and a half. `given` replaces settings, `more` are
    further words."""
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
        "write_report": "false",  # a third of the time of a short run
        **EVERYTHING,
    }
    settings = {name: value for name, value in (settings | given).items() if f"--{name}" not in more}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return ["train", "--recipe", "tiny-digits", *words, *more]


def weights(output: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step}" / "model.safetensors")
