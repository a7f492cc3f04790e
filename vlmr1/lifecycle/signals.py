"""SIGTERM, SIGUSR1 and Ctrl-C end a run after the current step, with a checkpoint; a second one ends it at once."""

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

DUPLICATE_S = 1.0  # seconds within which a repeated signal is ignored: terminals and launchers both send it


class StopSignals(TrainerCallback):
    """Context manager that handles the signals, and callback that ends the training loop after one.

    Before the first step and after the last there is nothing to save, so `Stopped` is raised at once. Signals that the
    process inherited as ignored stay ignored. Only the main thread can handle signals.
    """

    def __init__(self) -> None:
        self.caught = 0  # signal number, of this rank or another; 0: none
        self.in_step = False
        self.saved: int | None = None  # step of the last checkpoint written
        self.steps = (0, 0)  # (done, total)
        self.saves, self.advice = True, "run the same command to resume"
        self._times: dict[int, float] = {}  # first arrival of each signal
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
        if now - self._times.setdefault(number, now) > DUPLICATE_S:
            if os.isatty(2):
                os.write(2, b"\n")  # the shell's prompt stands on a line of its own
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)
            return
        self.caught = self.caught or number
        if not self.in_step:
            self.raise_if_stopped()
        note = f"\nvlmr1: {signal_name(number)}: stopping after this step; send it again to stop at once\n"
        with contextlib.suppress(OSError):  # stderr is closed
            os.write(2, note.encode())  # print is not reentrant

    def raise_if_stopped(self) -> None:
        """Raise Stopped if a signal was caught."""
        if not self.caught:
            return
        done, total = self.steps
        if not done:
            place, advice = "before its first step", "run the same command to start again"
        elif done == total:
            place, advice = "after its last step", f"all {total} updates are done"
        else:
            place = f"after step {done} of {total}"
            advice = self.advice
        raise Stopped(f"stopped by {signal_name(self.caught)} {place}; {advice}", 128 + self.caught)

    # The training loop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saves = args.save_strategy != SaveStrategy.NO
        if not self.saves:
            self.advice = "nothing is saved (save_strategy=no)"
        elif args.save_only_model:
            self.advice = "its weights are saved, but cannot be resumed (save_only_model)"
        self.steps = (state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_step = True
        if self.saved == state.global_step and self._any_rank_stopped(args):  # during the checkpoint
            self.raise_if_stopped()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = (state.global_step, state.max_steps)
        if self._any_rank_stopped(args):
            control.should_save = self.saves
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = state.global_step

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.saved == state.global_step:  # already saved, when a signal ended the epoch
            control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.in_step = False

    def _any_rank_stopped(self, args: Any) -> bool:
        """Return whether any rank has caught a signal, so that all stop at the same step."""
        number = self.caught
        if dist.is_available() and dist.is_initialized():
            largest = torch.tensor(number, device=args.device)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            number = int(largest)
        self.caught = self.caught or number
        return number > 0


def signal_name(number: int) -> str:
    """Return the name of a signal for messages."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
