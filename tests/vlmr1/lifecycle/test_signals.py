"""SIGTERM, SIGUSR1, Ctrl-C: a checkpoint at the end of the step, a message, the exit status that shells expect."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.forked import start
from tests.helpers.forked_ranks import finish_ranks, start_ranks
from tests.helpers.plants import At, kill
from tests.helpers.tiny_runs import assert_same, assert_whole, command, during, ended
from vlmr1.grpo.buffer import ROLLOUTS
from vlmr1.lifecycle.checkpoint import STAGING, last_complete

pytestmark = pytest.mark.slow  # seconds each
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
