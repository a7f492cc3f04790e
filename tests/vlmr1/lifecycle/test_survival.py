"""What interrupts a run from outside: disks that are full or cannot be written, files that are gone, processes that
die. SIGTERM, SIGUSR1, Ctrl-C: a checkpoint at the end of the step, a message, the exit status that shells expect."""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from tests.helpers.forked import start
from tests.helpers.forked_ranks import finish_ranks, start_ranks
from tests.helpers.plants import At, Grow, kill
from tests.helpers.tiny_runs import assert_same, assert_whole, command, during, ended
from vlmr1.cli import main
from vlmr1.grpo.buffer import ROLLOUTS
from vlmr1.lifecycle.checkpoint import STAGING, last_complete

pytestmark = pytest.mark.slow  # seconds each
KILL_LOADERS = """
for pid, line in children().items():
    if "rewards.worker" not in line:
        os.system(f"(sleep 0.2; kill -KILL {pid}) &")
"""


# Disks


LIMITS = {
    "weights": (At("os.mkdir", f"{STAGING}checkpoint-3", Grow(5_000_000, kills=False)), "checkpoint-3"),
    "optimizer": (At("os.mkdir", f"{STAGING}checkpoint-3", Grow(15_000_000, kills=False)), "checkpoint-3"),
    "log line": (At("open", "metrics.jsonl", Grow(20, kills=False), count=3, mode="a"), "metrics.jsonl"),
    "settings": (At("open", "settings.json", Grow(3000, kills=False), mode="w"), "settings.json"),
}


@dataclass(frozen=True)
class SmallDisk:
    """In a run: a disk of 10 GiB that has the output directory alone, and a limit of a file."""

    output: Path
    limit: At

    def __call__(self) -> None:
        shutil.disk_usage = lambda path: SimpleNamespace(free=free_beside(self.output))  # type: ignore[assignment]
        self.limit()


def free_beside(output: Path) -> int:
    return 10 * 2**30 - sum(path.stat().st_size for path in output.rglob("*") if path.is_file())


@pytest.mark.parametrize(("limit", "what"), LIMITS.values(), ids=LIMITS.keys())
def test_a_file_that_cannot_grow(limit, what, undisturbed, run, tmp_path):
    """What the system says to a write that goes beyond a limit comes out as one message; nothing half-written stays,
    nor counts as used; and the same command goes on where there is room again."""
    output = tmp_path / "out"
    text = run(2, prepare=SmallDisk(output, limit))
    free = f"{free_beside(output) / 2**30:.2f} GiB free without it"
    assert re.search(f"vlmr1: {what} cannot be written to {output}: [^;]+; {free}", text), text
    assert [path.name for path in output.iterdir() if path.name.startswith(STAGING) or path.suffix == ".tmp"] == []
    if what == "settings.json":
        assert last_complete(output) is None and not (output / what).exists()
    else:
        assert last_complete(output) == output / "checkpoint-2"
        assert "checkpoint-2 is complete: fix the problem and run the same command to resume from it\n" in text
    assert ("continuing from" in run(0)) == (what != "settings.json")
    assert_same(output, undisturbed.output)


NO_MODEL = ["train", "--model_name_or_path", "/no/such/model"]
UNWRITABLE = {
    "a file": lambda folder: folder / "file",
    "below a file": lambda folder: folder / "file" / "run",
    "not for files": lambda _folder: Path("/proc/vlmr1"),
}


@pytest.mark.parametrize("place", UNWRITABLE.values(), ids=UNWRITABLE.keys())
@pytest.mark.parametrize("words", [NO_MODEL, ["demo"]], ids=["train", "demo"])
def test_an_output_directory_that_cannot_be(words, place, tmp_path, capsys):
    """Found before the model is looked for."""
    (tmp_path / "file").write_text("")
    assert main([*words, "--output_dir", str(place(tmp_path)), "--use_cpu", "true"]) == 2
    assert f"vlmr1: output_dir {place(tmp_path)} cannot be written: " in capsys.readouterr().err


# Files that are gone


def test_checkpoints_that_the_user_deletes_are_not_missed(undisturbed, run, tmp_path):
    """Both, in the midst of step 3: rotation and the next checkpoints go on."""
    output = tmp_path / "out"
    during(undisturbed.data, 2, f"[shutil.rmtree(p) for p in pathlib.Path({str(output)!r}).glob('checkpoint-*')]")
    run(0)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert_same(output, undisturbed.output)


@pytest.fixture
def stopped(undisturbed, tmp_path) -> Path:
    """The output directory of a run that ended after step 2."""
    output = tmp_path / "out"
    shutil.copytree(undisturbed.output / "checkpoint-2", output / "checkpoint-2")
    shutil.copy(undisturbed.output / "settings.json", output)
    return output


GONE = {  # at which opening of a file, in a run that goes on
    "before it is read": ("tiny/checkpoint/config.json", 1),
    "when the weights are read": ("checkpoint-2/trainer_state.json", 4),
}


@pytest.mark.parametrize(("file", "opening"), GONE.values(), ids=GONE.keys())
def test_a_checkpoint_that_is_deleted_while_it_is_read(file, opening, stopped, run):
    """The library would go on with the weights and a new optimizer."""
    text = run(2, prepare=At("open", file, partial(delete, stopped / "checkpoint-2"), count=opening))
    assert f"vlmr1: {stopped / 'checkpoint-2'} was deleted or changed while it was read (" in text


def delete(folder: Path, _path: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "settings.json"])
def test_a_file_with_other_content(name, stopped, run):
    """An optimizer is too large for a digest in the manifest; the settings are not part of the checkpoint."""
    path = stopped / "checkpoint-2" / name if name == "optimizer.pt" else stopped / name
    path.write_bytes(bytes(path.stat().st_size))
    assert f"vlmr1: {stopped / 'checkpoint-2' if name == 'optimizer.pt' else path} cannot be read (" in run(2)


# Processes


DEATHS = {
    "a loader": (KILL_LOADERS, "mine", "DataLoader worker (pid "),
    "a reward": ("", "dies", "its process died with exit status -9 for the row "),
}


@pytest.mark.parametrize(("code", "reward", "says"), DEATHS.values(), ids=DEATHS.keys())
def test_a_process_that_dies_is_named(code, reward, says, undisturbed, run):
    during(undisturbed.data, 1, code)
    text = run(2, "--reward_funcs", f"{undisturbed.data / 'mine.py'}:{reward}", "--dataloader_num_workers", "1")
    said = [line for line in text.splitlines() if line.startswith("vlmr1: ")]
    assert len(said) == 1 and says in said[0], text


def test_no_process_outlives_the_run(undisturbed, tmp_path):
    """One prepares prompts, one is in a reward that lets no other thread of its process run."""
    data = undisturbed.data
    hanging = data / "hangs"
    more = ["--reward_funcs", f"{data / 'mine.py'}:hangs", "--dataloader_num_workers", "1", "--reward_timeout", "1000"]
    run = start(command(data, tmp_path / "out", *more), tmp_path / "log")
    wait_for(hanging.exists)
    children = children_of(run.pid)
    assert len(children) >= 2
    os.kill(run.pid, signal.SIGKILL)
    assert run.status() == -signal.SIGKILL
    wait_for(lambda: not any(is_running(child) for child in children))


def wait_for(condition: Callable[[], bool], limit: float = 120) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def children_of(parent: int) -> list[int]:
    return [
        int(pid) for task in Path(f"/proc/{parent}/task").iterdir() for pid in (task / "children").read_text().split()
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Signals


SELF = "os.kill(os.getpid(), signal.{})".format
WITHIN = "import vlmr1.lifecycle.signals; vlmr1.lifecycle.signals.DUPLICATE_S"
TELL_ALL = "[os.kill(pid, signal.SIGTERM) for pid in [*children(), os.getpid()]]"
NO_READER = "read, write = os.pipe(); os.close(read); os.dup2(write, 1); os.dup2(write, 2)"
EVERY = ["--logging_steps", "2", "--save_total_limit", "0"]  # signals find a line half-counted
RARELY = [*EVERY, "--save_steps", "100"]
SIGNALS = {
    "SIGTERM": ("SIGTERM", RARELY),
    "SIGUSR1": ("SIGUSR1", [*EVERY, "--save_strategy", "epoch"]),
    "SIGINT": ("Ctrl-C", EVERY),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_ends_the_run_after_its_step(name, undisturbed, run, tmp_path):
    """In step 3, the first of two on its generation; the checkpoint is written once, whatever else asks for it."""
    shown, more = SIGNALS[name]
    during(undisturbed.data, 2, SELF(name))
    output = tmp_path / "out"
    twice = At("os.rename", "out/checkpoint-3/", kill, count=2, argument=1)
    text = run(128 + signal.Signals[name], *more, prepare=twice)
    assert f"vlmr1: stopped by {shown} after step 3 of 6; run the same command to resume\n" in text, text
    assert text.count("stopping after this step") == 1
    assert last_complete(output) == output / "checkpoint-3" and (output / "checkpoint-3" / ROLLOUTS).exists()
    assert_whole(output, undisturbed.output)
    assert "continuing from" in run(0, *more)
    if name == "SIGTERM":
        ended(0, command(undisturbed.data, tmp_path / "whole", *EVERY), tmp_path / "log")
        assert_same(output, tmp_path / "whole")


BEFORE = "before its first step; run the same command to start again\n"
SENT = {  # signal and status, at which opening of a file, and what is said
    "SIGTERM": ("SIGTERM", 143, "tiny/checkpoint/config.json", BEFORE),
    "SIGINT": ("SIGINT", 130, "tiny/checkpoint/config.json", BEFORE),
    "while a checkpoint is written": (
        *("SIGTERM", 143, f"{STAGING}checkpoint-2/checkpoint-2/trainer_state.json"),
        "stopped by SIGTERM after step 2 of 6; run the same command to resume\n",
    ),
}


@pytest.mark.parametrize(("name", "status", "file", "says"), SENT.values(), ids=SENT.keys())
def test_a_signal_outside_of_a_step(name, status, file, says, run, tmp_path):
    """No step is begun that would have to be waited for."""
    assert says in run(status, prepare=At("open", file, partial(send, signal.Signals[name])))
    last = tmp_path / "out" / "checkpoint-2"
    assert last_complete(tmp_path / "out") == (None if says == BEFORE else last)


def test_a_second_signal_ends_it_at_once(undisturbed, tmp_path):
    """A repetition within a second does not count: terminals and launchers both send it."""
    data = undisturbed.data
    during(data, 1, f"{WITHIN}=1e9; {SELF('SIGTERM')}; {SELF('SIGTERM')}; {WITHIN}=0; {SELF('SIGTERM')}")
    run = start(command(data, tmp_path / "out"), tmp_path / "log")
    assert run.status() == -signal.SIGTERM
    assert run.output.count("send it again to stop at once") == 2 and "Traceback" not in run.output
    assert last_complete(tmp_path / "out") is None


def test_ctrl_c_in_another_command(undisturbed, tmp_path):
    data = undisturbed.data
    words = ["evaluate", "--model", "tiny", "--data", str(data / "train.jsonl"), "--images", str(data / "images")]
    words += ["--task", "rec", "--output_dir", str(tmp_path / "out")]
    at = At("open", "tiny/checkpoint/config.json", partial(send, signal.SIGINT))
    assert "vlmr1: stopped by Ctrl-C\n" in ended(130, words, tmp_path / "log", at)


def send(number: int, _path: Path) -> None:
    os.kill(os.getpid(), number)


def test_signals_to_every_process_of_a_run(undisturbed, run, tmp_path):
    """As schedulers send them: the processes that score and that prepare prompts go on until the step is done."""
    during(undisturbed.data, 2, TELL_ALL)
    rewards = [f"{undisturbed.data / 'mine.py'}:{name}" for name in ("apart", "mine")]
    run(143, *RARELY, "--reward_funcs", *rewards, "--dataloader_num_workers", "1")
    assert last_complete(tmp_path / "out") == tmp_path / "out" / "checkpoint-3"


def test_nobody_reads_the_output_any_more(undisturbed, run, tmp_path):
    """`vlmr1 train | tee log`, and Ctrl-C, which ends tee too: the run still saves, and says so by its status."""
    during(undisturbed.data, 2, f"{NO_READER}; {SELF('SIGINT')}")
    run(130, *EVERY)
    assert last_complete(tmp_path / "out") == tmp_path / "out" / "checkpoint-3"
    assert_whole(tmp_path / "out", undisturbed.output)


def test_ranks_stop_at_the_same_step(tmp_path):
    """The signal comes to one of them, in step 2."""
    ranks = start_ranks(stop_in_step_2, tmp_path / "out", logs=tmp_path / "rank")
    assert finish_ranks(ranks) == [143, 143], [run.output for run in ranks]
    said = "stopped by SIGTERM after step 2 of 4; run the same command to resume"
    assert all(said in run.output.splitlines() for run in ranks)


def stop_in_step_2(output: Path) -> int:
    from transformers import TrainerControl, TrainerState

    from vlmr1.config import GRPOConfig
    from vlmr1.errors import Stopped
    from vlmr1.lifecycle.signals import StopSignals

    dist.init_process_group("gloo")
    args = GRPOConfig(output_dir=str(output), use_cpu=True)
    state, control = TrainerState(max_steps=4), TrainerControl()
    with StopSignals() as stop:
        stop.on_train_begin(args, state, control)
        while not control.should_training_stop:
            stop.on_step_begin(args, state, control)
            if (dist.get_rank(), state.global_step) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            state.global_step += 1
            stop.on_step_end(args, state, control)
        stop.on_train_end(args, state, control)
        try:
            stop.raise_if_stopped()
        except Stopped as stopped:
            print(stopped, flush=True)
            return stopped.status
    return 0
