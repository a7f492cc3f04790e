"""Decode steps as CUDA graphs: one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vlmr1.rollout.sampling import SamplingSettings
from vlmr1.rollout.sequences import Batch

CAPTURE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
StepOutput = tuple[Tensor, Tensor, Tensor]  # tokens, logp and sampling_logp [S] of one step
Step = Callable[[Batch, Tensor], StepOutput]  # (filled batch, random numbers [S]) -> output


def capture_size(rows: int) -> int:
    """Return the smallest capture size of at least `rows`: one of `CAPTURE_SIZES`, or a multiple of 128."""
    return next((size for size in CAPTURE_SIZES if size >= rows), -(-rows // 128) * 128)


@dataclass(frozen=True)
class Capacity:
    """Sizes of a batch, or upper bounds of them: a graph runs every batch within its bounds."""

    rows: int
    groups: int
    columns: int  # of the block table
    max_group: int
    max_prefix: int

    def holds(self, other: Capacity) -> bool:
        """Return whether a batch of the other size fits."""
        return all(own >= each for own, each in zip(astuple(self), astuple(other), strict=True))

    def union(self, other: Capacity) -> Capacity:
        """Return the smallest capacity that holds both."""
        return Capacity(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True)
class GraphKey:
    """Values that a graph has baked in beside its capacity, KV cache and weights' addresses."""

    sampling: SamplingSettings  # those of them that the device reads
    position_dims: int
    vocabulary: int | None  # with a repetition penalty
    dtype: torch.dtype | None  # of autocast


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all warm-ups and captures on a device.

    A new stream each time would leave blocks in the allocator's cache that no other stream reuses."""
    return torch.cuda.Stream(device)


def new_pool() -> Any:
    """Return the memory pool of graphs that run one after another, so that they can share it."""
    return torch.cuda.graph_pool_handle()


class DecodeGraph:
    """A decode step captured on a filled batch, whose tensors it leaves as they were. Outputs are copied."""

    def __init__(self, step: Step, batch: Batch, capacity: Capacity, pool: Any):
        self.batch, self.capacity = batch, capacity
        device = batch.tokens.device
        self.draws = torch.zeros(batch.rows, dtype=torch.float64, device=device)
        state = [tensor.clone() for tensor in mutated_tensors(batch)]
        with torch.cuda.device(device):  # capture is on the current device
            current, side = torch.cuda.current_stream(), side_stream(device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                step(batch, self.draws)  # warm-up: compilation and lazy allocations
                self._capture(step, pool)
            current.wait_stream(side)
        # The cache needs no restoring: the first replay writes the rows that the warm-up wrote.
        for tensor, before in zip(mutated_tensors(batch), state, strict=True):
            tensor.copy_(before)

    def _capture(self, step: Step, pool: Any) -> None:
        """Capture the step on the current stream.

        `torch.cuda.graph` would wait for the device and empty the allocator's cache on entry. The update after the
        rollout would then allocate all its memory from the driver again."""
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the data loader's threads may pin memory during the capture.
        self.graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            self.output = step(self.batch, self.draws)
        except BaseException:
            with suppress(RuntimeError):  # an invalid capture ends with one; the error of the step is the cause
                self.graph.capture_end()
            raise
        self.graph.capture_end()

    def __call__(self, batch: Batch, draws: Tensor) -> StepOutput:
        """Replay the step on its batch with random numbers `draws` [S]."""
        assert batch is self.batch
        self.draws.copy_(draws)
        self.graph.replay()
        tokens, logp, sampling_logp = (column.clone() for column in self.output)
        return tokens, logp, sampling_logp


def mutated_tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors that a step changes."""
    tensors = [batch.tokens, batch.positions, batch.attention.suffix_lengths]
    return tensors if batch.seen is None else [*tensors, batch.seen]
