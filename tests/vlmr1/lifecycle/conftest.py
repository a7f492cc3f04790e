"""A run that nothing disturbs, and runs on the same data that something does."""

import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.tiny_runs import STEPS, command, differences, ended, write_data


@dataclass(frozen=True)
class Undisturbed:
    data: Path
    output: Path
    seconds: float


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Undisturbed:
    """It keeps all its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    data, output = write_data(folder / "data"), folder / "out"
    begin = time.monotonic()
    ended(0, command(data, output, "--save_total_limit", "0"), folder / "log")
    seconds = time.monotonic() - begin
    for step in range(1, STEPS):  # what a run that repeats or leaves out a step would not show
        before, after = (output / f"checkpoint-{n}" for n in (step, step + 1))
        assert "['model.embed_tokens.weight']" in differences(before, after)
    return Undisturbed(data, output, seconds)


@pytest.fixture
def run(undisturbed, tmp_path):
    """A function that runs on these data, in `tmp_path / "out"`, and returns the output."""

    def run(status: int, *more: str, prepare=None) -> str:
        return ended(status, command(undisturbed.data, tmp_path / "out", *more), tmp_path / "log", prepare)

    return run
