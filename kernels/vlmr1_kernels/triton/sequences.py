"""Rows, advantage and loss weight of each sequence."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels.inputs import LossInputs
from vlmr1_kernels.settings import GRPOSettings
from vlmr1_kernels.triton.group_advantages import STD_FLOOR, centered
from vlmr1_kernels.triton.launch import contiguous_aligned, launch

BLOCK = 256


class SequenceTable(NamedTuple):
    """Table of B sequences; float32 except `first`."""

    first: Tensor  # [B + 1] int64: sequence s has the rows first[s]..first[s + 1] - 1
    length: Tensor  # [B] rows, dropped ones included
    advantage: Tensor  # [B]
    weight: Tensor  # [B] of each row; the loss is the sum of weight * token loss


@triton.jit
def lower_bound(ids, count, value):
    """Return how many of `count` sorted ids are below each value."""
    low = tl.zeros_like(value)
    while count > 0:
        half = (count + 1) // 2
        low += tl.where(tl.load(ids + low + half - 1) < value, half, 0)
        count -= half
    return low


@triton.jit(do_not_specialize=["count", "selected_count", "sequences", "generations"])
def sequences_kernel(
    ids, count, selected, selected_count, sequences, advantages, rewards, generations, normalizer, share,
    first, length, advantage, weight, PER_LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(first + sequence, lower_bound(selected, selected_count, sequence), mask=sequence <= sequences)
    mask = sequence < sequences
    rows = (lower_bound(ids, count, sequence + 1) - lower_bound(ids, count, sequence)).to(tl.float32)
    tl.store(length + sequence, rows, mask=mask)
    if rewards is not None:
        value, std = centered(rewards, sequence, mask, generations)
        value /= std + STD_FLOOR
    else:
        value = tl.load(advantages + sequence, mask=mask).to(tl.float32)
    tl.store(advantage + sequence, value, mask=mask)
    if normalizer is not None:
        share /= tl.load(normalizer)
    value = tl.zeros_like(rows) + share
    if PER_LENGTH:  # a sequence without rows has no loss
        value = tl.where(rows > 0, value / rows, 0.0)
    tl.store(weight + sequence, value, mask=mask)


def sequence_table(seq_ids: Tensor, selected_ids: Tensor, inputs: LossInputs, settings: GRPOSettings) -> SequenceTable:
    """Return the table of `seq_ids` [N]; `selected_ids` [n] are those of the rows that were not dropped."""
    normalizer = inputs.normalizer
    assert normalizer is None or isinstance(normalizer, Tensor)
    advantages, rewards, normalizer = contiguous_aligned(inputs.advantages, inputs.rewards, normalizer)
    scores = rewards if advantages is None else advantages
    assert scores is not None
    count, per_sequence = scores.numel(), settings.divisor != "tokens"
    share = 1.0
    if normalizer is None:
        share = 1 / max(count if per_sequence else seq_ids.numel(), 1)
    if settings.divisor == "constant":
        share /= settings.max_completion_length or 1
    first = torch.empty(count + 1, dtype=torch.int64, device=seq_ids.device)
    length, advantage, weight = (torch.empty(count, dtype=torch.float32, device=seq_ids.device) for _ in range(3))
    launch(
        sequences_kernel, triton.cdiv(count + 1, BLOCK), seq_ids, seq_ids.numel(), selected_ids, selected_ids.numel(),
        count, advantages, rewards, inputs.num_generations, normalizer, share, first, length, advantage, weight,
        PER_LENGTH=settings.divisor == "length", BLOCK=BLOCK,
    )  # fmt: skip
    return SequenceTable(first, length, advantage, weight)
