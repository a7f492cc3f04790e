"""Row ranges of a layout's groups, and conversion of branches to a padded batch and back."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from vlmr1_kernels.layout import PrefixLayout


@dataclass(frozen=True)
class Group:
    """Row ranges of one group."""

    prompt: slice
    rows: slice  # of all branches
    size: int  # non-empty branches, G
    longest: int  # C
    slots: Tensor | None  # [R] index of each branch row in the padded batch G * C; None: no padding

    def split(self, packed: Tensor) -> Tensor:
        """Return branch rows [1, H, R, Dh] as a batch [G, H, C, Dh], zero-padded at the end.

        Causal attention never reads the padding, and its output gradient is 0."""
        _, heads, _, head_dim = packed.shape
        if self.slots is not None:
            padded = packed.new_zeros(1, heads, self.size * self.longest, head_dim)
            packed = padded.index_copy_(2, self.slots, packed)
        return packed[0].unflatten(1, (self.size, self.longest)).transpose(0, 1)

    def join(self, batch: Tensor) -> Tensor:
        """Return a batch [G, H, C, Dh] as branch rows [1, H, R, Dh]."""
        packed = batch.transpose(0, 1).flatten(1, 2)[None]
        return packed if self.slots is None else packed.index_select(2, self.slots)


@lru_cache(maxsize=64)
def groups(layout: PrefixLayout) -> tuple[Group, ...]:
    """Return the groups of a layout, cached for the calls of all decoder layers."""
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
