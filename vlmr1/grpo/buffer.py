"""The rollout buffer: one generation over all its prompts serves several updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, TypeVar

from torch.utils.data import BatchSampler, Sampler

from vlmr1.distributed.ranks import ALONE, Ranks
from vlmr1.grpo.pack_budget import log_probs, with_log_probs
from vlmr1.types import Completion, Group, Pack, Prompt

T = TypeVar("T")


class BufferSampler(BatchSampler):
    """This rank's rows for one generation, then an empty batch for each further update that it serves.

    The ranks share out a batch in turn, row by row. Every update needs a prompt on every rank: a last batch that has
    not got so many is left out."""

    def __init__(
        self, sampler: Sampler, *, prompts: int, parts: int, iterations: int, drop_last: bool, ranks: Ranks = ALONE
    ):
        super().__init__(sampler, prompts * parts * ranks.world_size, drop_last)
        self.ranks = ranks
        self.least = parts * ranks.world_size
        self.updates = parts * iterations

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            if len(batch) >= self.least:
                yield batch[self.ranks.rank :: self.ranks.world_size]
                yield from ([] for _ in range(self.updates - 1))

    def __len__(self) -> int:
        rows: int = len(self.sampler)  # type: ignore[arg-type]
        last = rows % self.batch_size
        return self.updates * (rows // self.batch_size + (not self.drop_last and last >= self.least))


@dataclass(frozen=True)
class Part:
    """What one update trains on: groups, and their packs with the log-probs of reference and old policy."""

    groups: list[Group]
    packs: list[Pack]
    counts: dict[str, float]


class Buffer:
    """The parts of one generation; each is taken once an iteration."""

    def __init__(self, iterations: int):
        self.iterations = iterations
        self.parts: list[Part] = []
        self.used = 0

    @property
    def spent(self) -> bool:
        return self.used >= len(self.parts) * self.iterations

    def fill(self, parts: Sequence[Part]) -> None:
        """Take a new generation; what is left of the one before it is gone."""
        self.parts, self.used = list(parts), 0

    def take(self) -> Part:
        """The next part; the first iteration over all parts comes before the second."""
        part = self.parts[self.used % len(self.parts)]
        self.used += 1
        return part

    # For checkpoints: tensors, numbers and texts in plain containers

    def state(self) -> dict[str, Any]:
        return {"used": self.used, "parts": [] if self.spent else [_part_state(part) for part in self.parts]}

    def load(
        self,
        state: dict[str, Any],
        prompt_of: Callable[[int], Prompt],
        pack: Callable[[Sequence[Group]], tuple[list[Pack], dict[str, float]]],
    ) -> None:
        """Take a state back; prompts are made again from their samples, packs from their groups."""
        self.parts, self.used = [], state["used"]
        for part in state["parts"]:
            groups = [_group(saved, prompt_of(saved["sample"])) for saved in part["groups"]]
            packs, counts = pack(groups)
            counts = part.get("counts", counts)
            completions = [completion for group in groups for completion in group.completions]
            known = {id(completions[place]): values for place, values in part["log_probs"].items()}
            self.parts.append(Part(groups, [with_log_probs(made, known) for made in packs], counts))


def parts_of(groups: Sequence[T], parts: int) -> list[list[T]]:
    """Groups in order, in parts whose sizes differ by one at most."""
    size, more = divmod(len(groups), parts)
    ends = [i * size + min(i, more) for i in range(parts + 1)]
    return [list(groups[start:end]) for start, end in pairwise(ends)]


def _part_state(part: Part) -> dict[str, Any]:
    groups = [
        {
            "sample": group.prompt.sample.index,
            "rewards": group.rewards,
            "advantages": group.advantages,
            "kl": group.kl,
            "completions": [{f.name: getattr(c, f.name) for f in fields(c)} for c in group.completions],
        }
        for group in part.groups
    ]
    completions = [completion for group in part.groups for completion in group.completions]
    known = log_probs(part.packs)
    places = {i: known[id(completion)] for i, completion in enumerate(completions) if id(completion) in known}
    return {
        "groups": groups,
        "log_probs": places,
        "counts": part.counts,
    }


def _group(saved: dict[str, Any], prompt: Prompt) -> Group:
    completions = tuple(Completion(**each) for each in saved["completions"])
    return Group(prompt, completions, saved["rewards"], saved["advantages"], saved.get("kl"))
