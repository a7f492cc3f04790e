"""Processes of one evaluation: rank, barrier, and failure of one as the end of all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vlmr1.errors import SettingError, UserError

FAILED = "failed"


class Ranks:
    """One of `count` processes; all methods are no-ops with one process."""

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None, timeout: timedelta = timedelta(seconds=1800)):
        self.rank, self.count = rank, count
        self.store = store
        self.timeout = timeout

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks. UserError with the message of a rank that failed, or after the timeout."""
        if self.count == 1:
            return
        try:
            dist.monitored_barrier(timeout=self.timeout)
        except RuntimeError as error:
            reason = self._failure() or f"another process has ended, or did not reach the barrier: {error}"
            raise UserError(reason) from error
        self.look()

    def look(self) -> None:
        """Raise the failure of another rank, if any."""
        if self.count > 1 and (message := self._failure()):
            raise UserError(message)

    def fail(self, error: BaseException) -> None:
        """Publish why this rank ends."""
        if self.count > 1 and not self._failure():
            self.store.set(FAILED, f"rank {self.rank}: {error}")

    def _failure(self) -> str | None:
        try:
            return self.store.get(FAILED).decode() if self.store.check([FAILED]) else None
        except RuntimeError:  # the process with the store has ended
            return "another process has ended: see what it wrote"


@contextmanager
def joined(timeout_s: float) -> Iterator[Ranks]:
    """Connect the processes of torchrun or accelerate by gloo while the block lasts; no-op for a single process."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    timeout = timedelta(seconds=timeout_s)
    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=timeout)))
        store = PrefixStore("vlmr1.evaluation", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise SettingError(f"WORLD_SIZE is {count}, but the processes cannot meet: {error}") from error
    ranks = Ranks(rank, count, store, timeout)
    try:
        yield ranks
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        dist.destroy_process_group()


def device(use_cpu: bool) -> torch.device:
    """Return the device of this process. A GPU becomes the current device, which CUDA graphs and kernels use."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(found)
    return found
