"""SIGTERM, SIGUSR1 and Ctrl-C end a run after the step that is running, with a checkpoint; a second one ends it at
once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from vlmr1.errors import Stopped
from vlmr1.lifecycle.processes import STOP_SIGNALS

SAME = 1.0  # seconds within which a signal is the same one: terminals and launchers both send it


class StopSignals(TrainerCallback):
    """A context that catches the signals, and the callback that ends the training loop after one.

    Before the first step and after the last there is nothing to save: `Stopped` is raised at once. Signals that the
    process was started to ignore stay ignored; in a thread that is not the main one, nothing is caught.
    """

    def __init__(self) -> None:
        self.caught = 0  # number of the signal that ends the run, of this rank or another
        self.waits = False  # for the end of a step
        self.saved: int | None = None  # step of the last checkpoint that this process wrote
        self.steps = (0, 0)  # done, and in all
        self.saves, self.rest = True, "the same command continues"
        self._times: dict[int, float] = {}  # when a signal came first
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process:  # a loader worker, between its fork and its own handlers
            return
        now = time.monotonic()
        if now - self._times.setdefault(number, now) > SAME:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)
            return
        self.caught = self.caught or number
        if not self.waits:
            self.leave()
        note = f"\nvlmr1: {name_of(number)}: the run ends after this step; once more ends it at once\n"
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(2, note.encode())  # print could be in the midst of a line

    def leave(self) -> None:
        """Raises Stopped where a signal was caught."""
        if not self.caught:
            return
        done, total = self.steps
        if not done:
            place, rest = "before its first step", "give the same command to go on"
        elif done == total:
            place, rest = "after its last step", f"all {total} updates are done"
        else:
            place = f"after step {done} of {total}"
            rest = self.rest
        raise Stopped(f"stopped by {name_of(self.caught)} {place}; {rest}", 128 + self.caught)

    # The training loop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saves = args.save_strategy != SaveStrategy.NO
        if not self.saves:
            self.rest = "nothing is saved, as save_strategy is no"
        elif args.save_only_model:
            self.rest = "its weights are saved, and as save_only_model is set no run goes on from them"
        self.steps = (state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.waits = True
        if self.saved == state.global_step and self._agreed(args):  # it came while the checkpoint was written
            self.leave()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = (state.global_step, state.max_steps)
        if self._agreed(args):
            control.should_save = self.saves
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.saved == state.global_step:  # the last step's, where a signal cut the epoch short
            control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.waits = False

    def _agreed(self, args: Any) -> bool:
        """Whether any rank has caught a signal: all of them stop at the same step."""
        number = self.caught
        if dist.is_available() and dist.is_initialized():
            of_all = torch.tensor(number, device=args.device)
            dist.all_reduce(of_all, op=dist.ReduceOp.MAX)
            number = int(of_all)
        self.caught = self.caught or number
        return number > 0


def name_of(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
