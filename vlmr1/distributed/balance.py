"""Balance of groups over ranks: about as many tokens on every rank, with as few groups moved as possible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

from vlmr1.distributed.ranks import Ranks, interleaved
from vlmr1.types import Group, Prompt

T = TypeVar("T")
EVEN = 1.1  # a rank with this many times the mean of the tokens is left alone: a moved image is processed again


@dataclass(frozen=True)
class Place:
    """A group of a step: the rank that drew it, its place there, and the tokens that it costs."""

    home: int
    index: int
    tokens: int


def balance_over_ranks(places: Sequence[Place], world: int) -> list[list[Place]]:
    """The groups of an update by the rank that trains on them, in their order; none without a group.

    From the fullest rank the group that evens out most goes to the emptiest one, until the fullest has at most `EVEN`
    times the mean or nothing helps any more."""
    ranks = [[place for place in places if place.home == rank] for rank in range(world)]
    while True:
        loads = [sum(place.tokens for place in own) for own in ranks]
        fullest, emptiest = loads.index(max(loads)), loads.index(min(loads))
        lacking = next((rank for rank in range(world) if not ranks[rank]), None)
        if lacking is not None:
            fullest, emptiest = max(range(world), key=lambda rank: len(ranks[rank])), lacking
        elif loads[fullest] * world <= EVEN * sum(loads):
            break
        gap = loads[fullest] - loads[emptiest]
        moved = min(ranks[fullest], key=lambda place: (abs(gap - 2 * place.tokens), place.home, place.index))
        if lacking is None and (len(ranks[fullest]) == 1 or abs(gap - 2 * moved.tokens) >= gap):
            break
        ranks[fullest].remove(moved)
        ranks[emptiest].append(moved)
    order = {id(place): i for i, place in enumerate(places)}
    return [sorted(own, key=lambda place: order[id(place)]) for own in ranks]


def exchange(
    groups: Sequence[Group], tokens: Sequence[int], parts: int, ranks: Ranks, prompt_of: Callable[[int], Prompt]
) -> list[list[Group]]:
    """This rank's groups of each of `parts` updates, from those that it drew; `tokens` is what each costs.

    A group that goes to another rank is sent without its prompt, which is made again there from its sample."""
    if ranks.world_size == 1:
        return parts_of(groups, parts)
    costs = ranks.all_gather(list(tokens))
    everyone = interleaved([[Place(r, i, n) for i, n in enumerate(own)] for r, own in enumerate(costs)])
    plans = [balance_over_ranks(part, ranks.world_size) for part in parts_of(everyone, parts)]  # [parts][ranks]
    leaving = {p.index for plan in plans for r, own in enumerate(plan) for p in own if p.home == ranks.rank != r}
    moves = any(place.home != rank for plan in plans for rank, own in enumerate(plan) for place in own)
    sent = ranks.all_gather({i: _without_prompt(groups[i]) for i in leaving}) if moves else []

    def group_at(place: Place) -> Group:
        if place.home == ranks.rank:
            return groups[place.index]
        sample, group = sent[place.home][place.index]
        return replace(group, prompt=prompt_of(sample))

    return [[group_at(place) for place in plan[ranks.rank]] for plan in plans]


def parts_of(groups: Sequence[T], parts: int) -> list[list[T]]:
    """Groups in order, in parts whose sizes differ by one at most."""
    size, more = divmod(len(groups), parts)
    ends = [i * size + min(i, more) for i in range(parts + 1)]
    return [list(groups[start:end]) for start, end in pairwise(ends)]


def _without_prompt(group: Group) -> tuple[int, Group]:
    completions = tuple(completion.on_host() for completion in group.completions)
    return group.prompt.sample.index, replace(group, prompt=None, completions=completions)  # type: ignore[arg-type]
