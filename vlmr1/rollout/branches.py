"""What a rollout has in flight: groups, their branches, and the tensors of a step over these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from vlmr1.rollout.engine import Drawn
from vlmr1.rollout.kv import BLOCK, DecodeAttention, Pool, blocks_of
from vlmr1.types import Prompt


@dataclass(eq=False)
class Flight:
    """A group in flight: its prompt's run of blocks is kept until its last branch has ended."""

    index: int  # of the group, among the prompts
    prompt: Prompt
    block: int  # first of the prompt's run
    left: int  # branches that have not ended

    @property
    def length(self) -> int:
        return len(self.prompt.input_ids)


@dataclass(eq=False)
class Branch:
    """One completion as it grows. Its last token has been chosen, and is not in the cache yet."""

    flight: Flight
    index: int  # among the branches of its group
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    sampling_logp: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    looked: int = 0  # tokens that were found not to end it

    @property
    def cached(self) -> int:
        return len(self.tokens) - 1

    def lacks(self, steps: int) -> int:
        """Blocks that it needs for so many steps, and has not got."""
        return max(0, blocks_of(self.cached + steps) - len(self.blocks))

    def drawn(self, length: int, finish_reason: str) -> Drawn:
        """Its first `length` tokens as a completion."""
        return Drawn(self.tokens[:length], self.logp[:length], self.sampling_logp[:length], finish_reason)


class Batch:
    """The tensors of a step over S branches, which are in the order of their groups."""

    def __init__(self, branches: Sequence[Branch], pool: Pool, capacity: int, seen: Tensor | None):
        device = pool.rows.device
        groups = [(flight, len(list(of))) for flight, of in groupby(branches, key=lambda branch: branch.flight)]
        flights, counts = zip(*groups, strict=True)
        cached = [branch.cached for branch in branches]
        self.branches = branches
        self.kinds = len(flights[0].prompt.positions)  # K
        self.tokens = torch.tensor([branch.tokens[-1] for branch in branches], device=device)  # [S]
        self.positions = torch.tensor(
            [b.flight.prompt.next_position + b.cached for b in branches], device=device
        )  # [S]
        self.seen = seen  # [S, V] tokens that the repetition penalty is for
        self.attention = DecodeAttention(
            pool,
            group_offsets=_int32(np.cumsum([0, *counts]), device),
            prefix_starts=_int32([flight.block * BLOCK for flight in flights], device),
            prefix_lengths=_int32([flight.length for flight in flights], device),
            suffix_blocks=torch.full(
                (len(branches), blocks_of(capacity)), pool.scratch, dtype=torch.int32, device=device
            ),
            suffix_lengths=_int32(cached, device),
            max_group=max(counts),
            max_prefix=max(flight.length for flight in flights),
        )
        self.show_blocks()
        # Of the random numbers: prompt, branch, and the position that is drawn next.
        self.prompt_keys = np.array([branch.flight.prompt.sample.index for branch in branches])
        self.branch_keys = np.array([branch.index for branch in branches])
        self.places = np.array(cached) + 1

    def show_blocks(self) -> None:
        """Tell the device which blocks the branches have now."""
        table = self.attention.suffix_blocks
        blocks = np.full(table.shape, self.attention.pool.scratch, dtype=np.int32)
        for row, branch in zip(blocks, self.branches, strict=True):
            row[: len(branch.blocks)] = branch.blocks
        table.copy_(torch.from_numpy(blocks))

    def advance(self, tokens: Tensor) -> None:
        """These tokens [S] were chosen."""
        self.tokens = tokens
        self.positions = self.positions + 1
        self.places = self.places + 1
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)


def _int32(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32, device=device)
