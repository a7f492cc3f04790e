"""The processes of a run and their collectives, which are no-ops when the world size is 1."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vlmr1.errors import RankError, SettingError, UserError

T = TypeVar("T")
FAILED = "failed"


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run. Every rank must call each collective, in the same order.

    With a `store`, a rank that fails leaves its message there, and the others raise it at their next barrier."""

    rank: int = 0
    world_size: int = 1
    store: Any = field(default=None, kw_only=True)
    timeout: timedelta = field(default=timedelta(seconds=1800), kw_only=True)  # of a barrier with a store

    @property
    def is_first(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in the order of the ranks; tensors should be on the CPU."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with _translate_rank_errors():
            dist.all_gather_object(values, value)
        return values

    def all_gather_list(self, values: Sequence[T]) -> list[T]:
        """Return the concatenated lists of all ranks."""
        return [value for part in self.all_gather(values) for value in part]

    def all_reduce_sum(self, number: float) -> float:
        """Return the sum over all ranks."""
        return sum(self.all_gather(number))

    def all_reduce_max(self, number: int) -> int:
        """Return the maximum over all ranks."""
        return max(self.all_gather(number))

    def barrier(self) -> None:
        """Wait for all ranks. RankError if one has ended; UserError with its message if there is a store."""
        if self.world_size == 1:
            return
        if self.store is None:
            with _translate_rank_errors():
                dist.barrier()
            return
        try:
            dist.monitored_barrier(timeout=self.timeout)
        except RuntimeError as error:
            raise UserError(self._failure() or f"another process has ended or timed out: {error}") from error
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise UserError with the message of a rank that has failed, if there is one."""
        if self.world_size > 1 and (message := self._failure()):
            raise UserError(message)

    def report_failure(self, error: BaseException) -> None:
        """Tell the other ranks why this one ends; the first message counts."""
        if self.world_size > 1 and not self._failure():
            self.store.set(FAILED, f"rank {self.rank}: {error}")

    def _failure(self) -> str | None:
        if self.store is None:
            return None
        try:
            return self.store.get(FAILED).decode() if self.store.check([FAILED]) else None
        except RuntimeError:  # the process that held the store has ended
            return "another process has ended: see its output"


ALONE = Ranks()


@contextmanager
def process_group(timeout_s: float) -> Iterator[Ranks]:
    """Context manager that joins the processes started by torchrun or accelerate in a gloo group with a store.

    SettingError if they do not find each other within `timeout_s` seconds."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    timeout = timedelta(seconds=timeout_s)
    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=timeout)))
        store = PrefixStore("vlmr1.evaluation", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise SettingError(f"WORLD_SIZE is {count}, but the processes cannot connect: {error}") from error
    ranks = Ranks(rank, count, store=store, timeout=timeout)
    try:
        yield ranks
    except BaseException as error:
        ranks.report_failure(error)
        raise
    finally:
        dist.destroy_process_group()


def local_device(use_cpu: bool) -> torch.device:
    """Return the GPU of this process and make it current, as CUDA graphs and kernels require; else the CPU."""
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextmanager
def _translate_rank_errors() -> Iterator[None]:
    """Turn the RuntimeError of a collective into a RankError."""
    try:
        yield
    except RuntimeError as error:
        raise RankError("another rank has ended: see its output") from error


def interleaved(lists: Sequence[Sequence[T]]) -> list[T]:
    """Return the first element of each rank's list, then the second of each, and so on.

    This is the order of a batch whose k-th row went to rank k mod world size."""
    longest = max(map(len, lists))
    return [each[i] for i in range(longest) for each in lists if i < len(each)]
