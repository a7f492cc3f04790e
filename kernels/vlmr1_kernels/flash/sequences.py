"""The sequences that a layout's two flash calls run over."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from vlmr1_kernels.layout import PrefixLayout


@dataclass(frozen=True)
class Sequences:
    """Sequences behind one another, as the kernels take them."""

    offsets: Tensor  # [S + 1] int32, on the device
    longest: int


@dataclass(frozen=True)
class Shared:
    """The branch rows of each group, one sequence a group, and the prompts that they all look at."""

    queries: Sequences
    keys: Sequences
    prompts: Tensor | None  # rows of those prompts; None: all prompt rows


@dataclass(frozen=True)
class Plan:
    own: Sequences  # every prompt and every branch
    prompt_rows: int
    shared: Shared | None  # None: no group has branch rows


@lru_cache(maxsize=64)
def plan(layout: PrefixLayout, device: torch.device) -> Plan:
    """Made on the host, once: every decoder layer asks again."""
    branches = [length for group in layout.branch_lengths for length in group if length]
    own = _sequences([*layout.prompt_lengths, *branches], device)
    return Plan(own, layout.prompt_total, _shared(layout, device) if branches else None)


def _shared(layout: PrefixLayout, device: torch.device) -> Shared:
    rows = [sum(lengths) for lengths in layout.branch_lengths]
    lengths = [length for length, count in zip(layout.prompt_lengths, rows, strict=True) if count]
    prompts = None
    if not all(rows):
        spans = zip(layout.prompt_offsets, layout.prompt_lengths, rows, strict=True)
        seen = [row for start, length, count in spans if count for row in range(start, start + length)]
        prompts = _on_device(seen, torch.int64, device)
    queries = _sequences([count for count in rows if count], device)
    return Shared(queries, _sequences(lengths, device), prompts)


def _sequences(lengths: Sequence[int], device: torch.device) -> Sequences:
    return Sequences(_on_device(list(accumulate(lengths, initial=0)), torch.int32, device), max(lengths))


def _on_device(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Through pinned memory, so that the host does not wait."""
    pinned = device.type == "cuda" and torch.cuda.is_available()
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)
