"""The rollout buffer: one generation over all its prompts serves several updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, Sampler
from transformers.trainer_utils import has_length

from vlmr1.distributed.ranks import ALONE, Ranks
from vlmr1.errors import SettingError
from vlmr1.types import Completion, Group, Prompt

ROLLOUTS = "rollouts.pt"  # of a checkpoint: the buffer, where updates on it are left


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

    @classmethod
    def of(cls, args: Any, sampler: Any, ranks: Ranks) -> BufferSampler:
        """The sampler of these settings; SettingError where the rows are too few for an update."""
        made = cls(
            sampler,
            prompts=args.prompts_per_device,
            parts=args.updates_per_generation,
            iterations=args.num_iterations,
            drop_last=args.dataloader_drop_last,
            ranks=ranks,
        )
        if has_length(sampler) and not len(made):
            each = "" if ranks.world_size == 1 else f" on each of {ranks.world_size} ranks"
            raise SettingError(
                f"{len(sampler)} rows are too few: an update needs one{each}, and steps_per_generation is "
                f"{args.updates_per_generation} (dataloader_drop_last is {args.dataloader_drop_last})"
            )
        return made

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            if len(batch) >= self.least:
                yield batch[self.ranks.rank :: self.ranks.world_size]
                yield from ([] for _ in range(self.updates - 1))  # the Trainer's loop takes a batch an update

    def __len__(self) -> int:
        """The updates of an epoch. TypeError for a sampler without end."""
        rows: int = len(self.sampler)  # type: ignore[arg-type]
        return self.updates * (rows // self.batch_size + (rows % self.batch_size > self.unused))

    @property
    def unused(self) -> int:
        """The rows at the end of an epoch that are too few for a batch."""
        last = len(self.sampler) % self.batch_size  # type: ignore[arg-type]
        return last if self.drop_last or last < self.least else 0


@dataclass(frozen=True)
class Minibatch:
    """The groups of one update, and the metrics of their generation."""

    groups: list[Group]
    metrics: dict[str, float]


class Buffer:
    """The minibatches of one generation; each is taken once an iteration. A checkpoint keeps those that are left:
    tensors, numbers and texts in plain containers, a file a rank. Prompts are made again from their samples."""

    def __init__(self, iterations: int, prompt_of: Callable[[int], Prompt] | None = None, ranks: Ranks = ALONE):
        """`prompt_of`: the prompt of a `Sample.index`."""
        self.iterations = iterations
        self.prompt_of = prompt_of
        self.file = ROLLOUTS if ranks.world_size == 1 else f"{ranks.rank}-{ROLLOUTS}"
        self.minibatches: list[Minibatch] = []
        self.used = 0

    @property
    def spent(self) -> bool:
        return self.used >= len(self.minibatches) * self.iterations

    @property
    def groups(self) -> list[Group]:
        """The groups of all minibatches."""
        return [group for minibatch in self.minibatches for group in minibatch.groups]

    def fill(self, minibatches: Sequence[Minibatch]) -> None:
        """Replace the content by a new generation."""
        self.minibatches, self.used = list(minibatches), 0

    def take(self) -> Minibatch:
        """The next minibatch; the first iteration over all of them comes before the second."""
        minibatch = self.minibatches[self.used % len(self.minibatches)]
        self.used += 1
        return minibatch

    def save(self, checkpoint: Path, *, writes: bool = True) -> None:
        """Write this rank's minibatches, if updates on them are left; every rank has its own."""
        if not self.spent:
            parts = [_state(minibatch) for minibatch in self.minibatches]
            torch.save({"used": self.used, "parts": parts}, checkpoint / self.file)

    def load(self, checkpoint: Path) -> None:
        """Take back what `save` wrote, if it wrote anything."""
        if not (checkpoint / self.file).exists():
            return
        state = torch.load(checkpoint / self.file, weights_only=True)
        self.minibatches, self.used = [self._minibatch(part) for part in state["parts"]], state["used"]

    def _minibatch(self, part: dict[str, Any]) -> Minibatch:
        assert self.prompt_of is not None
        groups = [_group(saved, self.prompt_of(saved["sample"])) for saved in part["groups"]]
        completions = [completion for group in groups for completion in group.completions]
        # Older checkpoints have what passes computed apart from the completions, by their place.
        for place, values in part.get("log_probs", {}).items():
            completions[place].old_logp = values["old_logp"]
            completions[place].ref_logp = values["ref_logp"]
            completions[place].importance_denominator = values["trust_logp"]
        return Minibatch(groups, part.get("counts", {}))


def _state(minibatch: Minibatch) -> dict[str, Any]:
    groups = [
        {
            "sample": group.prompt.sample.index,
            "rewards": group.rewards,
            "advantages": group.advantages,
            "kl": group.kl,
            "completions": [vars(replace(completion.on_host(), logged={})) for completion in group.completions],
        }
        for group in minibatch.groups
    ]
    return {"groups": groups, "counts": minibatch.metrics}


def _group(saved: dict[str, Any], prompt: Prompt) -> Group:
    completions = tuple(Completion(**each) for each in saved["completions"])
    return Group(prompt, completions, saved["rewards"], saved["advantages"], saved.get("kl"))
