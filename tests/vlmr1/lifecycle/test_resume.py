"""Runs that end, and checkpoints that are whole or ignored."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.helpers.digit_runs import STEPS, command, weights
from vlmr1.cli import main
from vlmr1.config import GRPOConfig
from vlmr1.errors import Stopped
from vlmr1.lifecycle.checkpoint import MANIFEST, integrity_error, last_complete, publish, rotate, staged, truncate_after
from vlmr1.lifecycle.disk import checkpoint_bytes, warn_if_low_space
from vlmr1.lifecycle.signals import StopSignals
from vlmr1.report.progress import read_metrics


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    assert main(command(data, output)) == 0
    return output


def test_a_finished_run_is_left_as_it_is(data, finished, capsys):
    before, metrics = weights(finished), read_metrics(finished)
    assert main(command(data, finished)) == 0
    assert f"checkpoint-{STEPS}: all {STEPS} updates are done" in capsys.readouterr().out
    assert read_metrics(finished) == metrics and not (finished / f"checkpoint-{STEPS + 1}").exists()
    assert all(torch.equal(before[name], value) for name, value in weights(finished).items())


def written(folder: Path) -> Path:
    """Files of a checkpoint of a few bytes."""
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "sub").mkdir()
    (folder / "sub" / "state").write_bytes(b"1")
    return folder


def published(folder: Path, *steps: int) -> None:
    for step in steps:
        publish(written(folder / "tmp"), folder / f"checkpoint-{step}")


def test_publish_names_every_file_with_its_size_and_small_ones_with_their_digest(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmr1.lifecycle.checkpoint.HASHED_MIB", 4 / 2**20)
    published(tmp_path, 2)
    manifest = json.loads((tmp_path / "checkpoint-2" / MANIFEST).read_text())
    one = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"  # printf 1 | sha256sum
    assert manifest == {"files": {"sub/state": 1, "weights": 5}, "sha256": {"sub/state": one}}
    assert not (tmp_path / "tmp").exists()


FAULTS = {  # file, what is left of it, and what is said
    "no manifest": (MANIFEST, None, "manifest.json is missing"),
    "cut manifest": (MANIFEST, '{"files": {"wei', "manifest.json is not a valid manifest"),
    "other manifest": (MANIFEST, "[]", "manifest.json is not a valid manifest"),
    "file missing": ("sub/state", None, "sub/state is missing"),
    "file cut": ("weights", "123", "weights has 3 bytes instead of 5"),
    "file changed": ("weights", "12346", "weights has changed since it was written"),
}


@pytest.mark.parametrize(("file", "left", "says"), FAULTS.values(), ids=FAULTS.keys())
def test_resume_passes_over_what_is_not_whole(file, left, says, tmp_path, caplog):
    published(tmp_path, 2, 10)
    assert last_complete(tmp_path) == tmp_path / "checkpoint-10"
    broken = tmp_path / "checkpoint-10"
    (broken / file).unlink()
    if left is not None:
        (broken / file).write_text(left)
    assert integrity_error(broken) is not None and not caplog.records
    assert last_complete(tmp_path) == tmp_path / "checkpoint-2"
    assert caplog.messages == [f"{broken} is skipped: {says}"]


def test_a_checkpoint_of_before_has_sizes_only(tmp_path):
    published(tmp_path, 2)
    (tmp_path / "checkpoint-2" / MANIFEST).write_text('{"files": {"weights": 5, "sub/state": 1}}')
    assert integrity_error(tmp_path / "checkpoint-2") is None


ROTATIONS = {
    "oldest first": ([2, 4, 10], 10, 2, [4, 10]),
    "no limit": ([2, 4, 10], 10, None, [2, 4, 10]),
    "zero is no limit": ([2, 4, 10], 10, 0, [2, 4, 10]),
    "within the limit": ([2, 4], 4, 2, [2, 4]),
    "one": ([2, 4], 4, 1, [4]),
    "steps of another course go first": ([2, 3, 8, 10], 3, 2, [2, 3]),
    "never the newest": ([8, 10, 3], 3, 1, [3]),
}


@pytest.mark.parametrize(("steps", "newest", "limit", "left"), ROTATIONS.values(), ids=ROTATIONS.keys())
def test_rotation(steps, newest, limit, left, tmp_path):
    published(tmp_path, *steps)
    (tmp_path / "checkpoint-1").mkdir()  # of another program
    rotate(tmp_path, limit, tmp_path / f"checkpoint-{newest}")
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in [1, *left]}


def test_a_checkpoint_that_cannot_be_removed_is_left(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    published(tmp_path, 2, 4)
    monkeypatch.setattr(Path, "rename", refuse)
    rotate(tmp_path, 1, tmp_path / "checkpoint-4")
    assert caplog.messages == [f"{tmp_path / 'checkpoint-2'} cannot be removed: [Errno 13] Permission denied"]


def test_what_is_published_again_replaces_what_was(tmp_path):
    published(tmp_path, 2)
    again = written(tmp_path / "tmp")
    (again / "weights").write_bytes(b"54321")
    publish(again, tmp_path / "checkpoint-2")
    assert (tmp_path / "checkpoint-2" / "weights").read_bytes() == b"54321"
    assert integrity_error(tmp_path / "checkpoint-2") is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_failed_save_publishes_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"), staged(tmp_path, "checkpoint-4") as folder:
        written(folder / "checkpoint-4")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_logs_drop_later_steps_and_half_lines(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    truncate_after(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_size_of_a_checkpoint_is_estimated(finished, model, tmp_path, caplog):
    """3 times the weights for AdamW in float32; what else is in a checkpoint is small. What is not trained has no
    moments."""
    weights_only, whole = (checkpoint_bytes(model, "adamw_torch_fused", weights_only=only) for only in (True, False))
    written = sum(path.stat().st_size for path in (finished / f"checkpoint-{STEPS}").iterdir())
    assert whole == 3 * weights_only and whole == pytest.approx(written, rel=0.02)
    assert checkpoint_bytes(model, "adamw_torch_8bit") == weights_only * 1.5
    assert checkpoint_bytes(model, "sgd") == weights_only
    model.model.visual.requires_grad_(False)
    tower = sum(parameter.nbytes for parameter in model.model.visual.parameters())
    assert checkpoint_bytes(model, "adamw_torch_fused") == whole - 2 * tower
    warn_if_low_space(tmp_path, whole)
    assert not caplog.records
    warn_if_low_space(tmp_path / "not" / "yet", 2**60)
    assert "but a checkpoint takes about 1073741824.00 GiB" in caplog.text


@pytest.mark.slow
def test_no_run_goes_on_from_weights_alone(data, tmp_path, capsys):
    words = command(data, tmp_path, max_steps=4, save_only_model="true")
    assert main(words) == 0
    assert main(words) == 0  # it is finished
    shutil.rmtree(tmp_path / "checkpoint-4")
    metrics = read_metrics(tmp_path)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "checkpoint-2 has no optimizer state (save_only_model)" in said
    assert f"model_name_or_path={tmp_path / 'checkpoint-2'}\n" in said
    assert read_metrics(tmp_path) == metrics


# How a process ends, and what a run that a signal has ended says of how it can go on


NOTHING = "after step 2 of 4; nothing is saved (save_strategy=no)"
WEIGHTS = "after step 2 of 4; its weights are saved, but cannot be resumed (save_only_model)"
WORDS = {
    "whole": ({}, 2, "after step 2 of 4; run the same command to resume"),
    "weights-only": ({"save_only_model": True}, 2, WEIGHTS),
    "nothing": ({"save_strategy": "no"}, 2, NOTHING),
    "nothing-of-weights-only": ({"save_strategy": "no", "save_only_model": True}, 2, NOTHING),
    "before": ({}, 0, "before its first step; run the same command to start again"),
    "done": ({"save_only_model": True}, 4, "after its last step; all 4 updates are done"),
}


@pytest.mark.parametrize(("settings", "step", "words"), WORDS.values(), ids=WORDS.keys())
def test_what_is_left_is_said(settings, step, words, tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    stop, control, state = StopSignals(), TrainerControl(), TrainerState(max_steps=4)
    stop.on_train_begin(args, state, control)
    if step:
        stop.caught = signal.SIGUSR1
        state.global_step = step
        stop.on_step_end(args, state, control)
        assert control.should_training_stop
        assert control.should_save == (settings.get("save_strategy") != "no")
    stop.caught = signal.SIGUSR1
    with pytest.raises(Stopped) as stopped:
        stop.raise_if_stopped()
    assert (stopped.value.status, str(stopped.value)) == (128 + signal.SIGUSR1, f"stopped by SIGUSR1 {words}")


PROGRAM = """
import atexit, sys
from vlmr1.lifecycle.processes import exit_process
class Left:
    def __del__(self):
        print("taken down", flush=True)
left = Left()
atexit.register(print, "at exit")
sys.stdout.write("not flushed, ")
exit_process(3)
"""


@pytest.mark.parametrize(("world", "said"), [("1", "taken down\n"), ("2", "")], ids=["alone", "a rank"])
def test_a_rank_ends_with_what_was_registered_and_no_more(world, said):
    here = os.environ | {"WORLD_SIZE": world, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, f"not flushed, at exit\n{said}"), done.stderr
