"""Several processes of one evaluation: who they are, how they wait for each other, how one's failure ends all."""

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
    """One of `count` processes; alone, nothing here does anything."""

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None, timeout: timedelta = timedelta(seconds=1800)):
        self.rank, self.count = rank, count
        self.store = store
        self.timeout = timeout

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Until all are here. UserError with the message of a rank that failed, or did not come in time."""
        if self.count == 1:
            return
        try:
            dist.monitored_barrier(timeout=self.timeout)
        except RuntimeError as error:
            raise UserError(self._failure() or f"another process is gone, or did not come: {error}") from error
        self.look()

    def look(self) -> None:
        """Raises the failure of another rank, where there is one."""
        if self.count > 1 and (message := self._failure()):
            raise UserError(message)

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends."""
        if self.count > 1 and not self._failure():
            self.store.set(FAILED, f"rank {self.rank}: {error}")

    def _failure(self) -> str | None:
        try:
            return self.store.get(FAILED).decode() if self.store.check([FAILED]) else None
        except RuntimeError:  # the process that held the store is gone
            return "another process has ended: see what it wrote"


@contextmanager
def joined(timeout_s: float) -> Iterator[Ranks]:
    """The process among those that torchrun or accelerate started, or alone; joined by gloo while the block lasts."""
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
    """The GPU of this process, where there is one and it is wanted; it becomes the current one, which CUDA graphs and
    kernels without a device of their own use."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(found)
    return found
