"""A run of the embedded model that takes two seconds, and what two of them must have in common."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils._pytree import keystr, tree_flatten_with_path

from tests.helpers import digit_runs
from tests.helpers.digit_runs import STEPS
from tests.helpers.forked import finish
from vlmr1.grpo.buffer import ROLLOUTS
from vlmr1.lifecycle.checkpoint import STAGING, integrity_error
from vlmr1.report.progress import COMPLETIONS, read_metrics
from vlmr1.tiny import digits

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
        "reward_funcs": f"{data / 'mine.py'}:mine",
        "save_steps": 1,
        "save_total_limit": 2,
        "num_generations": 2,
        "num_iterations": 2,
        "max_completion_length": 8,
        "temperature": 3.0,
        "learning_rate": 1e-4,
    }
    return digit_runs.command(data, output, *more, **settings)


def ended(status: int, words: list[str], log: Path, prepare: Callable[[], None] | None = None) -> str:
    """The output of `vlmr1 words`, which has to end with this status, and without a traceback."""
    found, text = finish(words, log, prepare)
    assert found == status and "Traceback" not in text, text
    return text


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
    one, two = map(state_of, (checkpoint, other))
    return [name for name in one | two if name not in one or name not in two or not equal(one[name], two[name])]


def state_of(checkpoint: Path) -> dict[str, Any]:
    """The leaves of all files by their path."""
    files = [checkpoint / name for name in ("optimizer.pt", "scheduler.pt", ROLLOUTS)]
    state = {path.name: torch.load(path) for path in files if path.exists()}
    state |= load_file(checkpoint / "model.safetensors")
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(state)[0]}


def equal(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) else one == two


def metrics(output: Path) -> list[dict[str, float]]:
    """The logged metrics that do not depend on the machine."""
    return [{k: v for k, v in row.items() if not MEASURED.search(k)} for row in read_metrics(output)]
