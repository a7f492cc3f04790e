"""Collectives between ranks; no-ops when the world size is 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from vlmr1.errors import RankError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. Every rank has to call each method, in the same order."""

    rank: int = 0
    world: int = 1

    def all_gather(self, value: T) -> list[T]:
        """One value a rank, in the order of the ranks; tensors are best on the CPU."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with _together():
            dist.all_gather_object(values, value)
        return values

    def all_gather_list(self, values: Sequence[T]) -> list[T]:
        """The lists of all ranks, one after the other."""
        return [value for own in self.all_gather(values) for value in own]

    def all_reduce_sum(self, number: float) -> float:
        """The sum over all ranks."""
        return sum(self.all_gather(number))

    def all_reduce_max(self, number: int) -> int:
        """The maximum over all ranks."""
        return max(self.all_gather(number))

    def barrier(self) -> None:
        """Until every rank is here."""
        if self.world > 1:
            with _together():
                dist.barrier()


ALONE = Ranks()


@contextmanager
def _together() -> Iterator[None]:
    """RankError where another rank is gone: it has said why."""
    try:
        yield
    except RuntimeError as error:
        raise RankError("another rank has ended: see what it wrote") from error


def interleaved(lists: Sequence[Sequence[T]]) -> list[T]:
    """The first of each rank, then the second of each, and so on: the order of a batch whose k-th row went to rank
    k mod world."""
    longest = max(map(len, lists))
    return [each[i] for i in range(longest) for each in lists if i < len(each)]
