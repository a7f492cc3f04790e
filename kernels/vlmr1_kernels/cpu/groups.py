"""The row ranges of a layout's groups, and branches as a batch."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vlmr1_kernels.layout import PrefixLayout


@dataclass(frozen=True)
class Group:
    """One group: the rows of its prompt and of its branches, and how the latter become a batch and back."""

    prompt: slice
    rows: slice
    size: int  # non-empty branches, G
    longest: int  # C
    slots: Tensor | None  # [R] place of each branch row in the padded G * C; None: nothing to pad

    def split(self, packed: Tensor) -> Tensor:
        """[1, H, R, Dh] -> [G, H, C, Dh]; short branches are padded with zeros at their end, where no row of
        theirs looks and from where, with a zero output gradient, nothing flows back."""
        _, heads, _, head_dim = packed.shape
        if self.slots is not None:
            padded = packed.new_zeros(1, heads, self.size * self.longest, head_dim)
            packed = padded.index_copy_(2, self.slots, packed)
        return packed[0].unflatten(1, (self.size, self.longest)).transpose(0, 1)

    def join(self, batch: Tensor) -> Tensor:
        """[G, H, C, Dh] -> [1, H, R, Dh]."""
        packed = batch.transpose(0, 1).flatten(1, 2)[None]
        return packed if self.slots is None else packed.index_select(2, self.slots)


@lru_cache(maxsize=64)
def groups(layout: PrefixLayout) -> tuple[Group, ...]:
    """The groups of a layout; cached, since every decoder layer asks again."""
    return tuple(_group(layout, index) for index in range(layout.num_groups))


def _group(layout: PrefixLayout, index: int) -> Group:
    lengths = [length for length in layout.branch_lengths[index] if length]
    longest, total = max(lengths, default=0), sum(lengths)
    slots = None
    if longest * len(lengths) != total:
        slots = torch.cat([torch.arange(length) + i * longest for i, length in enumerate(lengths)])
    start, first = layout.prompt_offsets[index], layout.group_offsets[index]
    prompt = slice(start, start + layout.prompt_lengths[index])
    return Group(prompt, slice(first, first + total), len(lengths), longest, slots)
