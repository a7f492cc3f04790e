"""Layout of packed groups of branches that share their prompt."""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate, islice

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixLayout:
    """Groups packed in one sequence: all prompts first, then the branches of group 0, of group 1, ...

        prompt_0 prompt_1 ... | branch_0,0 branch_0,1 ... | branch_1,0 ...

    Args:
        prompt_lengths: rows of each group's prompt, at least 1.
        branch_lengths: rows of the branches of each group. A branch may be empty, and a group may have none (prefill).

    `table` is the layout as an argument of a custom op: int64 on the CPU, see `layout_of`.

    Raises:
        ValueError: a length is out of range; the message names the group.
    """

    prompt_lengths: tuple[int, ...]
    branch_lengths: tuple[tuple[int, ...], ...]
    table: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt_lengths", tuple(int(length) for length in self.prompt_lengths))
        branches = tuple(tuple(int(length) for length in group) for group in self.branch_lengths)
        object.__setattr__(self, "branch_lengths", branches)
        if not self.prompt_lengths:
            raise ValueError("prompt_lengths is empty: a layout needs at least one group")
        if len(self.prompt_lengths) != len(branches):
            raise ValueError(
                f"prompt_lengths has {len(self.prompt_lengths)} groups, branch_lengths has {len(branches)}"
            )
        for group, (prompt, lengths) in enumerate(zip(self.prompt_lengths, branches, strict=True)):
            if prompt < 1:
                raise ValueError(f"prompt_lengths[{group}] is {prompt}; a prompt needs at least one row")
            if any(length < 0 for length in lengths):
                raise ValueError(f"branch_lengths[{group}] is {lengths}; lengths cannot be negative")
        flat = [length for lengths in branches for length in lengths]
        table = [len(branches), *self.prompt_lengths, *map(len, branches), *flat]
        # Made here and not at the first use: torch.compile takes it as an input, and needs no graph for each layout.
        object.__setattr__(self, "table", torch.tensor(table, dtype=torch.int64, device="cpu"))

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return len(self.prompt_lengths)

    @cached_property
    def prompt_offsets(self) -> tuple[int, ...]:
        """First row of each prompt."""
        return tuple(accumulate(self.prompt_lengths[:-1], initial=0))

    @cached_property
    def group_offsets(self) -> tuple[int, ...]:
        """First row of each group's branches."""
        rows = [sum(lengths) for lengths in self.branch_lengths]
        return tuple(accumulate(rows[:-1], initial=self.prompt_total))

    @cached_property
    def branch_offsets(self) -> tuple[tuple[int, ...], ...]:
        """First row of each branch of each group."""
        return tuple(
            tuple(accumulate(lengths[:-1], initial=start)) if lengths else ()
            for start, lengths in zip(self.group_offsets, self.branch_lengths, strict=True)
        )

    @cached_property
    def prompt_total(self) -> int:
        """Rows of all prompts."""
        return sum(self.prompt_lengths)

    @cached_property
    def total_length(self) -> int:
        """Rows of the packed sequence, L."""
        return self.prompt_total + sum(map(sum, self.branch_lengths))


def layout_of(table: Tensor) -> PrefixLayout:
    """Return the layout with this table: P, rows of the P prompts, number of branches of each, rows of the branches."""
    return _layout_of(tuple(table.tolist()))


@lru_cache(maxsize=64)
def _layout_of(values: tuple[int, ...]) -> PrefixLayout:
    groups, rest = values[0], iter(values[1:])
    prompts, counts = (tuple(islice(rest, groups)) for _ in range(2))
    return PrefixLayout(prompts, tuple(tuple(islice(rest, count)) for count in counts))
