"""How a process of a run ends, and what a run that a signal has ended says of how it can go on."""

import os
import signal
import subprocess
import sys

import pytest
from transformers import TrainerControl, TrainerState

from vlmr1.config import GRPOConfig
from vlmr1.errors import Stopped
from vlmr1.lifecycle.signals import StopSignals

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
