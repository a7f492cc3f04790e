"""What a rollout has in flight: groups, their branches, and the tensors of a step over these."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from vlmr1.rollout.engine import Drawn
from vlmr1.rollout.kv_cache import BLOCK, DecodeAttention, Pool, blocks_of
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
    """The tensors of a step, of up to S branches in P groups. Their addresses stay; `fill` gives them other branches.

    Rows behind the last branch are padding: they write to the pool's scratch block, and nobody reads what they draw."""

    def __init__(
        self,
        pool: Pool,
        *,
        rows: int,
        groups: int,
        columns: int,
        kinds: int,
        max_group: int,
        max_prefix: int,
        vocabulary: int | None = None,
    ):
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=pool.rows.device)

        self.branches: Sequence[Branch] = ()
        self.kinds = kinds  # K, of the positions
        self.tokens, self.positions = zeros(rows, dtype=torch.int64), zeros(rows, dtype=torch.int64)
        # [S, V] tokens that the repetition penalty is for
        self.seen = None if vocabulary is None else zeros(rows, vocabulary, dtype=torch.bool)
        self.attention = DecodeAttention(
            pool,
            group_offsets=zeros(groups + 1),
            prefix_starts=zeros(groups),
            prefix_lengths=zeros(groups),
            suffix_blocks=zeros(rows, columns),
            suffix_lengths=zeros(rows),
            max_group=max_group,
            max_prefix=max_prefix,
        )
        # Of the random numbers: prompt, branch, and the position that is drawn next.
        self.prompt_keys, self.branch_keys, self.places = (np.zeros(rows, dtype=np.int64) for _ in range(3))

    @property
    def rows(self) -> int:
        return len(self.tokens)

    def fill(self, branches: Sequence[Branch]) -> None:
        """Take these branches, which are in the order of their groups."""
        self.branches = branches
        groups = [(flight, len(list(of))) for flight, of in groupby(branches, key=lambda branch: branch.flight)]
        ends = np.cumsum([count for _, count in groups])
        attention = self.attention
        _copy(attention.group_offsets[1:], ends, rest=len(branches))
        _copy(attention.prefix_starts, [flight.block * BLOCK for flight, _ in groups])
        _copy(attention.prefix_lengths, [flight.length for flight, _ in groups], rest=1)
        _copy(attention.suffix_lengths, [branch.cached for branch in branches])
        _copy(self.tokens, [branch.tokens[-1] for branch in branches])
        _copy(self.positions, [branch.flight.prompt.next_position + branch.cached for branch in branches])
        self.show_blocks()
        self.prompt_keys[: len(branches)] = [branch.flight.prompt.sample.index for branch in branches]
        self.branch_keys[: len(branches)] = [branch.index for branch in branches]
        self.places[: len(branches)] = [len(branch.tokens) for branch in branches]
        if self.seen is not None:
            _copy(self.seen, seen(branches, self.seen.shape[1]), rest=False)

    def show_blocks(self) -> None:
        """Tell the device which blocks the branches have now."""
        table = self.attention.suffix_blocks
        blocks = np.full(table.shape, self.attention.pool.scratch, dtype=np.int32)
        for row, branch in zip(blocks, self.branches, strict=False):
            row[: len(branch.blocks)] = branch.blocks
        table.copy_(torch.from_numpy(blocks))

    def advance(self, tokens: Tensor) -> None:
        """These tokens [S] were chosen."""
        self.tokens.copy_(tokens)
        self.positions.add_(1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)


def seen(branches: Sequence[Branch], vocabulary: int) -> np.ndarray:
    """[S, V] bool: which tokens prompt and completion have so far."""
    found = np.zeros((len(branches), vocabulary), dtype=bool)
    for row, branch in zip(found, branches, strict=True):
        row[branch.flight.prompt.input_ids.numpy()] = True
        row[branch.tokens] = True
    return found


def _copy(target: Tensor, values: Sequence[int] | np.ndarray, rest: int = 0) -> None:
    """The first rows of a tensor get these values, those behind them `rest`."""
    filled = np.full(target.shape, rest, dtype=torch.empty(0, dtype=target.dtype).numpy().dtype)
    filled[: len(values)] = values
    target.copy_(torch.from_numpy(filled))
