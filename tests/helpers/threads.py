"""Ranks that are threads of one process, and meet at a barrier."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Barrier, Thread
from typing import Any

from vlmr1.distributed.ranks import Ranks


@dataclass(frozen=True)
class Threads(Ranks):
    said: list = field(default_factory=list)
    meeting: Barrier = field(default_factory=lambda: Barrier(1))

    def all_gather(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        self.meeting.wait(300)
        values = list(self.said)
        self.meeting.wait(300)
        return values


def on_ranks(world: int, function: Callable[[Ranks], Any]) -> list[Any]:
    """What the function returns on each rank."""
    said, barrier, results = [None] * world, Barrier(world), [None] * world

    def run(rank: int) -> None:
        results[rank] = function(Threads(rank, world, said, barrier))

    threads = [Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
