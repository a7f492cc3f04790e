"""kill -9 at any moment: the same command continues, and ends as if nothing had been.

`make test` has five of these, `make soak` all."""

import os
import random
import shutil
import signal

import pytest

from tests.helpers.forked import finish, start
from tests.helpers.plants import At, Grow, kill
from tests.helpers.tiny_runs import STEPS, assert_same, assert_whole, command
from vlmr1.lifecycle.checkpoint import last_complete

pytestmark = pytest.mark.slow  # seconds each
SOAK = pytest.mark.soak
STAGED = ".staging-checkpoint-3/checkpoint-3"


def assert_continues(undisturbed, output, run):
    assert_whole(output, undisturbed.output)
    last = last_complete(output)
    text = run(0)
    assert (f"continuing from {last}" in text) or last is None or last.name == f"checkpoint-{STEPS}"
    assert_same(output, undisturbed.output)


PLANTS = {
    "weights": (At("os.mkdir", ".staging-checkpoint-3", Grow(5_000_000)), 2),
    "before the renaming": (At("os.rename", "out/checkpoint-3/", kill, argument=1), 2),
    "rotation": (At("os.remove", "rng_state.pth", kill), 3),
    "log line": (At("open", "metrics.jsonl", Grow(20), count=3, mode="a"), 2),
    "optimizer": (At("os.mkdir", ".staging-checkpoint-3", Grow(15_000_000)), 2),
    "between the files": (At("open", f"{STAGED}/trainer_state.json", kill), 2),
    "manifest": (At("open", f"{STAGED}/manifest.json", Grow(10), mode="w"), 2),
    "after the renaming": (At("shutil.rmtree", ".staging-checkpoint-3", kill), 3),
    "completion": (At("open", "completions.jsonl", Grow(30), count=10, mode="a"), 2),
    "settings": (At("open", "settings.json", Grow(3000), mode="w"), None),
}
EVERY = ("weights", "before the renaming", "rotation", "log line")  # the others are left to the soak
CASES = [pytest.param(*plant, id=name, marks=() if name in EVERY else SOAK) for name, plant in PLANTS.items()]


@pytest.mark.parametrize(("plant", "last"), CASES)
def test_killed_in_the_midst_of_a_file_operation(plant, last, undisturbed, run, tmp_path):
    output = tmp_path / "out"
    status, text = finish(command(undisturbed.data, output), tmp_path / "log", plant)
    assert status in (-signal.SIGKILL, -signal.SIGXFSZ), text
    assert last_complete(output) == (last and output / f"checkpoint-{last}")
    assert_continues(undisturbed, output, run)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=SOAK) for seed in range(1, 10))])
def test_killed_at_a_random_moment(seed, undisturbed, run, tmp_path):
    output = killed_once(undisturbed, tmp_path, random.Random(seed).random() * undisturbed.seconds)
    assert_continues(undisturbed, output, run)


@pytest.mark.soak
def test_killed_again_and_again(undisturbed, run, tmp_path):
    """Twenty times at most, each after another third of a run, until the run is done."""
    output, moments = killed_once(undisturbed, tmp_path, undisturbed.seconds / 3), random.Random(100)
    assert_whole(output, undisturbed.output)
    kills = 1
    while kills < 20 and killed(undisturbed, output, tmp_path / "log", moments.uniform(0.3, 1) * undisturbed.seconds):
        assert_whole(output, undisturbed.output)
        kills += 1
    assert_continues(undisturbed, output, run)


def killed_once(undisturbed, folder, delay):
    """The output of a run that was killed after `delay` seconds, or sooner: one that was done by then does not count,
    the machine is faster now than it was for the undisturbed run."""
    output = folder / "out"
    while not killed(undisturbed, output, folder / "log", delay):
        shutil.rmtree(output)
        delay *= 0.7
    return output


def killed(undisturbed, output, log, delay):
    """Run, and kill after `delay` seconds; whether it still ran then."""
    run = start(command(undisturbed.data, output), log)
    run.process.join(delay)
    if run.process.exitcode is None:
        os.kill(run.pid, signal.SIGKILL)
    status = run.status()
    print(f"after {delay:.3f} s: {status}", run.output[-300:], sep="\n")  # shown where the test fails
    assert status in (0, -signal.SIGKILL)
    return status != 0
