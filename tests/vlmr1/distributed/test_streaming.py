"""Training on a stream: one process and two take the same rows, and a run that is resumed goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.forked_ranks import run_forked
from tests.helpers.two_ranks import assert_same, computed, metrics, resumable, words
from vlmr1.cli import main

# Three generations of four rows, of eight: the stream begins anew in the second.
STREAM = {"streaming": "true", "shuffle_buffer_size": 3, "max_steps": 6}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoint-6" / "model.safetensors")


def assert_equal_runs(one: Path, other: Path) -> None:
    assert computed(metrics(one)) == computed(metrics(other))
    both = weights(one), weights(other)
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def alone(folder: Path, output: Path, **more: object) -> Path:
    arguments = words(folder, output, prompts_per_device=2, use_cpu="true", **STREAM | more)
    assert main(["train", *arguments]) == 0
    return output


def sources(output: Path) -> list[list[int]]:
    """The lines of the rows whose completions were logged, by update."""
    steps: dict[int, list[int]] = {}
    for line in (output / "completions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        steps.setdefault(row["step"], []).append(int(row["source"].rpartition(":")[2]))
    return [list(dict.fromkeys(lines)) for lines in steps.values()]


@pytest.mark.slow
def test_two_ranks_stream_the_rows_of_one_process_and_resume_exactly(folder, tmp_path, capsys):
    expected = alone(folder, tmp_path / "alone", log_completions=6)
    assert "streamed rows; an update: 2 prompts" in capsys.readouterr().out
    found = run_forked("ddp", folder, tmp_path / "run", **STREAM)
    assert_same(found[:2], metrics(expected)[:2])  # one generation: later ones are drawn from weights that round apart
    assert found[-1]["grad_norm"] > 0
    assert [own[0] for own in sources(tmp_path / "run")] == [both[0] for both in sources(expected)]  # the first rank's

    resumed = resumable(tmp_path / "run", tmp_path / "resumed")
    run_forked("ddp", folder, resumed, **STREAM)
    assert_equal_runs(resumed, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_ends_as_the_run_that_was_not_stopped(workers, folder, tmp_path):
    whole = alone(folder, tmp_path / "whole", dataloader_num_workers=workers)
    resumed = alone(folder, resumable(whole, tmp_path / "resumed"), dataloader_num_workers=workers)
    assert_equal_runs(resumed, whole)


@pytest.mark.slow
def test_without_a_buffer_rows_are_in_the_order_of_the_file(folder, tmp_path):
    alone(folder, tmp_path, shuffle_buffer_size=0, steps_per_generation=1, log_completions=6)
    assert sources(tmp_path) == [[1, 2], [3, 4], [5, 6], [7, 8], [1, 2], [3, 4]]
