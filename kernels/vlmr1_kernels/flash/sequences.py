"""Sequences of the two flash calls of a layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from vlmr1_kernels.layout import PrefixLayout


@dataclass(frozen=True)
class Sequences:
    """Concatenated sequences."""

    cu_seqlens: Tensor  # [S + 1] int32, on the device
    max_length: int

    def spans(self, keys: "Sequences") -> tuple[Tensor, Tensor, int, int]:
        """Return the arguments of a flash call whose queries are these sequences."""
        return self.cu_seqlens, keys.cu_seqlens, self.max_length, keys.max_length


@dataclass(frozen=True)
class PrefixCall:
    """Second call: the branch rows of each group are one sequence, which attends to the prompt of the group."""

    queries: Sequences
    keys: Sequences
    prompts: Tensor | None  # [n] int64 rows of the prompts with branches; None: all prompt rows


@dataclass(frozen=True)
class Plan:
    """Arguments of the two flash calls of a layout."""

    causal: Sequences  # first call: every prompt and every branch
    prompt_rows: int
    prefix: PrefixCall | None  # None: no group has branch rows


@lru_cache(maxsize=64)
def plan(layout: PrefixLayout, device: torch.device) -> Plan:
    """Return the plan of a layout, cached for the calls of all decoder layers."""
    branches = [length for group in layout.branch_lengths for length in group if length]
    causal = _sequences([*layout.prompt_lengths, *branches], device)
    return Plan(causal, layout.prompt_total, _prefix_call(layout, device) if branches else None)


def _prefix_call(layout: PrefixLayout, device: torch.device) -> PrefixCall:
    rows = [sum(lengths) for lengths in layout.branch_lengths]
    lengths = [length for length, count in zip(layout.prompt_lengths, rows, strict=True) if count]
    prompts = None
    if not all(rows):
        spans = zip(layout.prompt_offsets, layout.prompt_lengths, rows, strict=True)
        seen = [row for start, length, count in spans if count for row in range(start, start + length)]
        prompts = _on_device(seen, torch.int64, device)
    queries = _sequences([count for count in rows if count], device)
    return PrefixCall(queries, _sequences(lengths, device), prompts)


def _sequences(lengths: Sequence[int], device: torch.device) -> Sequences:
    return Sequences(_on_device(list(accumulate(lengths, initial=0)), torch.int32, device), max(lengths))


def _on_device(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy through pinned memory, so that the host does not wait."""
    pinned = device.type == "cuda" and torch.cuda.is_available()
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)
