"""A run of the embedded model that takes two seconds, and what two of them must have in common."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vlmr1.grpo.buffer import ROLLOUTS
from vlmr1.lifecycle.checkpoint import STAGING, integrity_error
from vlmr1.report.progress import COMPLETIONS, read_metrics
from vlmr1.tiny import digits

STEPS = 6
MEASURED = re.compile("second|memory|power|energy")  # names of metrics that two runs do not share
# A reward of many values. Where the file `flag` is beside it, its nth call also does what that file says.
MINE = """
import os, pathlib, re, shutil, signal, time

FLAG = pathlib.Path(__file__).with_name("flag")
calls = 0

def mine(completions, **columns):
    global calls
    calls += 1
    if FLAG.exists():
        number, _, code = FLAG.read_text().partition(" ")
        if calls == int(number):
            FLAG.unlink()
            exec(code)
    return [len(set(completion[0]["content"])) / 10 for completion in completions]

def children():
    found = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text()
        except OSError:
            pass
    return found

def apart(completions, **columns):
    return [0.0] * len(completions)

def dies(completions, **columns):
    os.kill(os.getpid(), signal.SIGKILL)

def hangs(completions, **columns):
    FLAG.with_name("hangs").touch()
    re.match("(a+)+$", "a" * 60 + "b")  # for years, without letting another thread run

apart.isolated = dies.isolated = hangs.isolated = True
"""


def write_data(folder: Path) -> Path:
    """Four rows and the reward."""
    digits.write(folder, "train", 4, seed=3)
    (folder / "mine.py").write_text(MINE)
    return folder


def during(data: Path, generation: int, code: str) -> None:
    """Have the next run on these data execute `code` when it scores its nth generation: step 1, 3 or 5."""
    (data / "flag").write_text(f"{generation} {code}")


def command(data: Path, output: Path, *more: str) -> list[str]:
    """Two prompts a generation, two updates on each, four updates an epoch: six are an epoch and a half."""
    settings = {
        "data_file_paths": data / "train.jsonl",
        "image_folders": data / "images",
        "output_dir": output,
        "reward_funcs": f"{data / 'mine.py'}:mine",
        "max_steps": STEPS,
        "save_steps": 1,
        "save_total_limit": 2,
        "prompts_per_device": 2,
        "num_generations": 2,
        "num_iterations": 2,
        "max_completion_length": 8,
        "temperature": 3.0,
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "write_report": "false",
        "use_cpu": "true",
    }
    words = [str(word) for name, value in settings.items() if f"--{name}" not in more for word in (f"--{name}", value)]
    return ["train", "--recipe", "tiny-digits", *words, *more]


def assert_whole(output: Path, undisturbed: Path) -> None:
    """Every checkpoint that counts as complete is what the undisturbed run had at that step."""
    for checkpoint in output.glob("checkpoint-*"):
        if integrity_error(checkpoint) is None:
            assert differences(checkpoint, undisturbed / checkpoint.name) == []


def assert_same(output: Path, undisturbed: Path) -> None:
    """Two runs ended alike, and nothing is left of what was in between."""
    assert differences(output / f"checkpoint-{STEPS}", undisturbed / f"checkpoint-{STEPS}") == []
    assert metrics(output) == metrics(undisturbed)
    assert (output / COMPLETIONS).read_bytes() == (undisturbed / COMPLETIONS).read_bytes()
    assert [path.name for path in output.iterdir() if path.name.startswith(STAGING) or path.suffix == ".tmp"] == []


def differences(checkpoint: Path, other: Path) -> list[str]:
    """Names of the tensors in weights, optimizer and rollouts that are not bit-equal."""
    names = []
    states = [flat(load_file(folder / "model.safetensors")) for folder in (checkpoint, other)]
    for file in ("optimizer.pt", "scheduler.pt", ROLLOUTS):
        there = [(folder / file).exists() for folder in (checkpoint, other)]
        if there[0] != there[1]:
            names.append(file)
        elif there[0]:
            for state, folder in zip(states, (checkpoint, other), strict=True):
                state |= {f"{file}/{name}": value for name, value in flat(torch.load(folder / file)).items()}
    one, two = states
    return names + [name for name in one | two if name not in one or name not in two or not equal(one[name], two[name])]


def equal(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) else one == two


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested containers by their path."""
    if isinstance(value, dict):
        return {key: leaf for k, v in value.items() for key, leaf in flat(v, f"{name}/{k}").items()}
    if isinstance(value, list | tuple):
        return {key: leaf for k, v in enumerate(value) for key, leaf in flat(v, f"{name}/{k}").items()}
    return {name: value}


def metrics(output: Path) -> list[dict[str, float]]:
    """The logged metrics that do not depend on the machine."""
    return [{k: v for k, v in row.items() if not MEASURED.search(k)} for row in read_metrics(output)]
