"""The recipe of an adapter, run on the embedded model and data."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from vlmr1.cli import main
from vlmr1.report.progress import read_metrics
from vlmr1.tiny import digits

CPU = ["--use_cpu", "true"]


def test_run(tmp_path: Path):
    digits.write(tmp_path / "data", "train", 4, seed=3)
    settings = {
        "model_name_or_path": "tiny",
        "data_file_paths": tmp_path / "data" / "train.jsonl",
        "image_folders": tmp_path / "data" / "images",
        "output_dir": tmp_path / "run",
        "max_steps": 3,
        "save_steps": 1,
        "num_generations": 4,
        "max_completion_length": 24,
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    assert main(["train", "--recipe", "rec-3b-lora", *CPU, *words]) == 0
    history = read_metrics(tmp_path / "run")
    assert len(history) == 3 and history[0]["kl"] == 0  # bfloat16 too: adapter off is the model that it began as
    first, last = (load_file(tmp_path / "run" / f"checkpoint-{i}" / "adapter_model.safetensors") for i in (1, 3))
    assert {each.dtype for each in last.values()} == {torch.float32}
    assert all(name.split(".lora_")[0].split(".")[-1].endswith("_proj") for name in last)
    moved = {name for name in last if not torch.equal(first[name], last[name])}
    assert any("lora_A" in name for name in moved) and any("lora_B" in name for name in moved)
    shapes = {weight.shape[0] for name, weight in last.items() if "lora_A" in name}
    assert shapes == {64}
