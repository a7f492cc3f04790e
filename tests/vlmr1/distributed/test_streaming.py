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
STREAM = {"streaming": "true", "shuffle_buffer_size": 3, "max_steps": 6, "temperature": 1.3}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoint-6" / "model.safetensors")


def assert_equal_runs(one: Path, other: Path) -> None:
    assert [computed(step) for step in metrics(one)] == [computed(step) for step in metrics(other)]
    both = weights(one), weights(other)
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def alone(folder: Path, output: Path, **more: object) -> Path:
    arguments = words(folder, output, prompts_per_device=2, use_cpu="true", **STREAM | more)
    assert main(["train", *arguments]) == 0
    return output


@pytest.mark.slow
def test_two_ranks_stream_the_rows_of_one_process_and_resume_exactly(folder, tmp_path, capsys):
    expected = alone(folder, tmp_path / "alone")
    assert "streamed rows; an update: 2 prompts" in capsys.readouterr().out
    found = run_forked("ddp", folder, tmp_path / "run", **STREAM)
    assert_same(found, metrics(expected))
    assert found[-1]["grad_norm"] > 0

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
def test_the_order_of_a_run_is_that_of_the_file_without_a_buffer(folder, tmp_path):
    output = alone(folder, tmp_path, shuffle_buffer_size=0, steps_per_generation=1, log_completions=6)
    rows = [json.loads(line) for line in (output / "completions.jsonl").read_text().splitlines()]
    told = [row["prompt"].partition("row")[0] for row in rows]
    questions = [json.loads(line)["prompt"] for line in (folder / "data.jsonl").read_text().splitlines()]
    order = list(dict.fromkeys((row["step"], next(q for q in questions if q in row["prompt"])) for row in rows))
    assert len(told) == 36
    assert [question for _, question in order] == [questions[i % 8] for i in range(12)]
