"""Runs that are killed, and checkpoints that are whole or ignored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmr1.checkpoint import MANIFEST, is_complete, last_complete, publish, staged, truncate_after
from vlmr1.cli import main
from vlmr1.progress import read_metrics
from vlmr1.tiny import digits

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    digits.write(folder, "train", 8, seed=3)
    return folder


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
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return ["train", "--recipe", "tiny-digits", *words, *more]


def start(data: Path, output: Path) -> subprocess.Popen:
    return start_with(command(data, output))


def start_with(words: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "vlmr1.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def weights(output: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(output / f"checkpoint-{step}" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = start(data, folder)
    output, _ = run.communicate()
    assert run.returncode == 0, output
    before, after = weights(folder, 4), weights(folder)  # what a run that forgets its weights would not show
    assert all(not torch.equal(before[name], after[name]) for name in after)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [1, 5])
def test_killed_run_ends_with_the_same_weights(killed_after, data, undisturbed, tmp_path):
    run = start(data, tmp_path)
    assert run.stdout is not None
    for line in run.stdout:
        if f"step {killed_after} " in line:
            break
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / f"checkpoint-{STEPS}").exists()

    again = start(data, tmp_path)
    output, _ = again.communicate()
    assert again.returncode == 0, output
    assert ("continuing from" in output) == (killed_after > 2)
    assert "missing keys" not in output
    expected, found = weights(undisturbed), weights(tmp_path)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    keep = ("step", "loss", "reward", "kl", "grad_norm", "learning_rate")
    histories = [[[row[name] for name in keep] for row in read_metrics(run)] for run in (undisturbed, tmp_path)]
    assert histories[0] == histories[1]
    assert [row[0] for row in histories[0]] == list(range(1, STEPS + 1))


def test_a_finished_run_is_left_as_it_is(data, undisturbed, capsys):
    before, metrics = weights(undisturbed), read_metrics(undisturbed)
    assert main(command(data, undisturbed)) == 0
    assert f"checkpoint-{STEPS}: all {STEPS} updates are done" in capsys.readouterr().out
    assert read_metrics(undisturbed) == metrics and not (undisturbed / f"checkpoint-{STEPS + 1}").exists()
    assert all(torch.equal(before[name], value) for name, value in weights(undisturbed).items())


def written(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "sub").mkdir()
    (folder / "sub" / "state").write_bytes(b"1")
    return folder


def test_publish_names_every_file_with_its_size(tmp_path):
    publish(written(tmp_path / "tmp"), tmp_path / "checkpoint-2")
    manifest = json.loads((tmp_path / "checkpoint-2" / MANIFEST).read_text())
    assert manifest == {"files": {"sub/state": 1, "weights": 5}}
    assert not (tmp_path / "tmp").exists()


@pytest.mark.parametrize("fault", ["no manifest", "file missing", "file cut"])
def test_resume_ignores_what_is_not_whole(fault, tmp_path):
    for step in (2, 10):
        publish(written(tmp_path / "tmp"), tmp_path / f"checkpoint-{step}")
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"
    broken = tmp_path / "checkpoint-10"
    if fault == "no manifest":
        (broken / MANIFEST).unlink()
    elif fault == "file missing":
        (broken / "sub" / "state").unlink()
    else:
        (broken / "weights").write_bytes(b"123")
    assert not is_complete(broken)
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_a_failed_save_publishes_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"), staged(tmp_path, "checkpoint-4") as folder:
        written(folder / "checkpoint-4")
        raise OSError("disk full")
    assert last_complete(tmp_path) is None


def test_logs_drop_later_steps_and_half_lines(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    truncate_after(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_resumed_run_must_have_the_same_settings(data, tmp_path, capsys):
    assert main(command(data, tmp_path, "--max_steps", "2")) == 0
    assert main(command(data, tmp_path, "--max_steps", "2", "--learning_rate", "1e-3")) == 2
    assert "learning_rate is 0.001, but the run in" in capsys.readouterr().err


def test_a_named_checkpoint_must_be_complete(data, tmp_path, capsys):
    assert main(command(data, tmp_path, "--resume_from_checkpoint", str(tmp_path / "checkpoint-2"))) == 2
    assert "resume_from_checkpoint: " in capsys.readouterr().err
