"""Running groups and sequences of a rollout, and the tensors of a decode step over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmr1.rollout.engine import SampledCompletion
from vlmr1.rollout.kv_cache import BLOCK_SIZE, DecodeAttention, KVCache, num_blocks
from vlmr1.types import Prompt


@dataclass(eq=False)
class RunningGroup:
    """A group being decoded. Its prompt's blocks are freed when its last sequence has finished."""

    index: int  # among the prompts of the request
    prompt: Prompt
    first_block: int  # of the prompt
    unfinished: int  # sequences

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt.input_ids)

    def blocks(self) -> list[int]:
        """Return the blocks of the prompt."""
        return list(range(self.first_block, self.first_block + num_blocks(self.prompt_length)))


@dataclass(eq=False)
class RunningSequence:
    """One completion being decoded. Its last token has been sampled, but is not in the KV cache yet."""

    group: RunningGroup
    index: int  # in its group
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    sampling_logp: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    checked: int = 0  # tokens already checked against the stop criteria

    @property
    def cached(self) -> int:
        """Completion tokens in the KV cache."""
        return len(self.tokens) - 1

    def missing_blocks(self, steps: int) -> int:
        """Return how many blocks to allocate before the next `steps` decode steps."""
        return max(0, num_blocks(self.cached + steps) - len(self.blocks))

    def completion(self, length: int, finish_reason: str) -> SampledCompletion:
        """Return the first `length` tokens as a completion."""
        return SampledCompletion(self.tokens[:length], self.logp[:length], self.sampling_logp[:length], finish_reason)


@dataclass(eq=False)
class PreemptedGroup:
    """A group whose keys and values are in host memory until the KV cache has room for them again."""

    group: RunningGroup
    sequences: list[RunningSequence]
    stored: Tensor  # its blocks: those of the prompt, then those of each sequence

    @property
    def blocks(self) -> list[int]:
        """Number of blocks that each sequence needs for what it has cached."""
        return [num_blocks(sequence.cached) for sequence in self.sequences]


class Batch:
    """Tensors of a decode step over up to S sequences of P groups. `fill` changes their values, not their addresses.

    Rows after the last sequence are padding: they write to the scratch block, and their tokens are ignored."""

    def __init__(
        self,
        cache: KVCache,
        *,
        rows: int,
        groups: int,
        columns: int,
        position_dims: int,
        vocabulary: int | None = None,
        **bounds: Any,
    ):
        """`vocabulary`: V, with a repetition penalty; `bounds`: `max_group` and `max_prefix` of `DecodeAttention`."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=cache.data.device)

        self.sequences: Sequence[RunningSequence] = ()
        self.position_dims = position_dims  # K
        self.tokens, self.positions = zeros(rows, dtype=torch.int64), zeros(rows, dtype=torch.int64)
        # [S, V] tokens that the repetition penalty applies to
        self.seen = None if vocabulary is None else zeros(rows, vocabulary, dtype=torch.bool)
        self.attention = DecodeAttention(
            cache,
            group_offsets=zeros(groups + 1),
            prefix_starts=zeros(groups),
            prefix_lengths=zeros(groups),
            suffix_blocks=zeros(rows, columns),
            suffix_lengths=zeros(rows),
            **bounds,
        )
        # Keys of the random numbers [S]: sample, sequence, and index of the next token in the completion.
        self.prompt_keys, self.sequence_keys, self.token_indices = (np.zeros(rows, dtype=np.int64) for _ in range(3))

    @property
    def rows(self) -> int:
        """S, padding included."""
        return len(self.tokens)

    def fill(self, sequences: Sequence[RunningSequence]) -> None:
        """Set all tensors from `sequences`, which are ordered by group."""
        self.sequences = sequences
        groups = [(group, len(list(of))) for group, of in groupby(sequences, key=lambda sequence: sequence.group)]
        ends = np.cumsum([count for _, count in groups])
        attention = self.attention
        _copy(attention.group_offsets[1:], ends, padding=len(sequences))
        _copy(attention.prefix_starts, [group.first_block * BLOCK_SIZE for group, _ in groups])
        _copy(attention.prefix_lengths, [group.prompt_length for group, _ in groups], padding=1)
        _copy(attention.suffix_lengths, [sequence.cached for sequence in sequences])
        _copy(self.tokens, [sequence.tokens[-1] for sequence in sequences])
        _copy(self.positions, [sequence.group.prompt.next_position + sequence.cached for sequence in sequences])
        self.update_block_table()
        self.prompt_keys[: len(sequences)] = [sequence.group.prompt.sample.index for sequence in sequences]
        self.sequence_keys[: len(sequences)] = [sequence.index for sequence in sequences]
        self.token_indices[: len(sequences)] = [len(sequence.tokens) for sequence in sequences]
        if self.seen is not None:
            _copy(self.seen, seen_tokens(sequences, self.seen.shape[1]), padding=False)

    def update_block_table(self) -> None:
        """Copy the sequences' blocks to the device."""
        table = self.attention.suffix_blocks
        blocks = np.full(table.shape, self.attention.cache.scratch_block, dtype=np.int32)
        for row, sequence in zip(blocks, self.sequences, strict=False):
            row[: len(sequence.blocks)] = sequence.blocks
        table.copy_(torch.from_numpy(blocks))

    def advance(self, tokens: Tensor) -> None:
        """Set `tokens` [S] int64, just sampled, as the inputs of the next step."""
        self.tokens.copy_(tokens)
        self.positions.add_(1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)


def seen_tokens(sequences: Sequence[RunningSequence], vocabulary: int) -> np.ndarray:
    """Return [S, V] bool: True at the tokens of each prompt and completion so far."""
    seen = np.zeros((len(sequences), vocabulary), dtype=bool)
    for row, sequence in zip(seen, sequences, strict=True):
        row[sequence.group.prompt.input_ids.numpy()] = True
        row[sequence.tokens] = True
    return seen


def _copy(target: Tensor, values: Sequence[int] | np.ndarray, padding: int = 0) -> None:
    """Copy `values` to the first rows of a tensor and `padding` to the others."""
    filled = np.full(target.shape, padding, dtype=torch.empty(0, dtype=target.dtype).numpy().dtype)
    filled[: len(values)] = values
    target.copy_(torch.from_numpy(filled))
