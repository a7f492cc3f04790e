"""Dynamic sampling (DAPO, arXiv:2503.14476): groups whose rewards are all equal teach nothing, and give way to groups
of other prompts, drawn in further rounds from the same policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from vlmr1.rewards.aggregate import weighted_sum
from vlmr1.rollout.sampling import hash_keys
from vlmr1.types import Group

RESERVOIR = "reserve.json"  # of a checkpoint
STREAM = 0x9E5E  # keeps these permutations apart from other draws of the same seed


class PromptReservoir:
    """The rows that further rounds take: one permutation of the data after another, in an order of its own.

    The loader's order is left alone, so that an epoch still has the same number of updates and offers every row once.
    The position is the only state, and a part of checkpoints."""

    def __init__(self, indices: Sequence[int], seed: int):
        """`indices`: the `Sample.index` of each row of the data set."""
        self.indices = indices
        self.seed = seed
        self.position = 0
        self._turn, self._order = -1, torch.empty(0)

    def take(self, count: int, held: Collection[int]) -> list[int]:
        """The next `count` rows (places in the data set) whose `Sample.index` is not held; rows that are passed over
        have had their turn. Fewer where as many rows as there are were looked at."""
        taken: list[int] = []
        for _ in range(len(self.indices)):
            if len(taken) == count:
                break
            place = self._next()
            if self.indices[place] not in held and place not in taken:
                taken.append(place)
        return taken

    def _next(self) -> int:
        turn, place = divmod(self.position, len(self.indices))
        if turn != self._turn:
            random = torch.Generator().manual_seed(int(hash_keys(self.seed, STREAM, turn)) % 2**63)
            self._turn, self._order = turn, torch.randperm(len(self.indices), generator=random)
        self.position += 1
        return int(self._order[place])

    def save(self, checkpoint: Path, *, writes: bool = True) -> None:
        if writes:
            (checkpoint / RESERVOIR).write_text(json.dumps({"position": self.position}), encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        self.position = json.loads((checkpoint / RESERVOIR).read_text(encoding="utf-8"))["position"]


def resample(
    groups: Sequence[Group],
    draw: Callable[[list[int], int], list[Group]],
    reservoir: PromptReservoir,
    weights: Sequence[float],
    *,
    rounds: int,
    rank: int = 0,
    gather: Callable[[list[int]], list[int]] = list,
) -> tuple[list[Group], dict[str, float]]:
    """The groups, scored, with those whose rewards are all equal replaced as far as `rounds` further rounds can, and
    what it took.

    A round draws as many prompts as groups are to be replaced: `draw(places, round)` makes scored groups of those rows
    of the data set. Groups without signal that are left keep their place. `gather` joins the lists of all ranks:
    rounds go on until none needs one, every rank moves its reservoir alike, and calls `draw` in each round, one that
    needs none with no places: engines may have to gather weights on all of them."""
    kept, drawn, done = list(groups), list(groups), 0
    while done < rounds:
        equal = [i for i, group in enumerate(kept) if has_equal_rewards(group, weights)]
        wanted = gather([len(equal)])  # by rank
        if not any(wanted):
            break
        places = reservoir.take(sum(wanted), set(gather([group.prompt.sample.index for group in drawn])))
        if not places:
            break
        done += 1
        start = sum(wanted[:rank])
        new = draw(places[start : start + len(equal)], done)
        drawn += new
        for i, group in zip(equal, (group for group in new if not has_equal_rewards(group, weights)), strict=False):
            kept[i] = group
    return kept, _metrics(groups, kept, drawn, weights, done)


def has_equal_rewards(group: Group, weights: Sequence[float]) -> bool:
    """Return whether the weighted rewards of a group are all equal."""
    reward = _reward(group, weights)
    reward = reward[~reward.isnan()]  # those that a function scored
    return not len(reward) or bool(reward.max() == reward.min())


def _reward(group: Group, weights: Sequence[float]) -> torch.Tensor:
    assert group.rewards is not None
    return weighted_sum(group.rewards.double(), weights)  # [G]


def _metrics(
    first: Sequence[Group], kept: Sequence[Group], drawn: Sequence[Group], weights: Sequence[float], rounds: int
) -> dict[str, float]:
    """Metrics of this rank; the reward is the mean over all groups drawn, as without dynamic sampling."""
    used = {id(group) for group in kept}
    gone = [group for group in drawn if id(group) not in used]
    return {
        "dynamic_sampling/rounds": float(rounds),
        "dynamic_sampling/groups_drawn": float(len(drawn)),
        "dynamic_sampling/groups_replaced": float(sum(a is not b for a, b in zip(first, kept, strict=True))),
        "dynamic_sampling/groups_discarded": float(len(gone)),
        "dynamic_sampling/groups_left_flat": float(sum(has_equal_rewards(group, weights) for group in kept)),
        "dynamic_sampling/tokens_discarded": float(sum(len(c.token_ids) for group in gone for c in group.completions)),
        "dynamic_sampling/reward": float(torch.cat([_reward(group, weights) for group in drawn]).nanmean()),
    }
