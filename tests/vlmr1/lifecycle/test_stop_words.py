"""What a run that a signal has ended says of how it can go on."""

import signal
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from vlmr1.config import GRPOConfig
from vlmr1.errors import Stopped
from vlmr1.lifecycle.signals import StopSignals

WORDS = {
    "whole": ({}, 2, "after step 2 of 4; run the same command to resume"),
    "weights-only": (
        {"save_only_model": True},
        2,
        "after step 2 of 4; its weights are saved, but cannot be resumed (save_only_model)",
    ),
    "nothing": ({"save_strategy": "no"}, 2, "after step 2 of 4; nothing is saved (save_strategy=no)"),
    "nothing-of-weights-only": (
        {"save_strategy": "no", "save_only_model": True},
        2,
        "after step 2 of 4; nothing is saved (save_strategy=no)",
    ),
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
    assert said(stop) == f"stopped by SIGUSR1 {words}"


def said(stop: StopSignals) -> Any:
    with pytest.raises(Stopped) as stopped:
        stop.raise_if_stopped()
    assert stopped.value.status == 128 + signal.SIGUSR1
    return str(stopped.value)
