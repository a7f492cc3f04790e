"""A decode step as a CUDA graph: one launch instead of some thousand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmr1.rollout.sequences import Batch

LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
Columns = tuple[Tensor, Tensor, Tensor]  # tokens, logp and sampling_logp [S] of one step
Step = Callable[[Batch, Tensor], Columns]  # a filled batch and random numbers [S] -> the tokens of one step


def rung(rows: int) -> int:
    """The batch size of the ladder that holds so many rows; beyond its end the next multiple of 128."""
    return next((size for size in LADDER if size >= rows), -(-rows // 128) * 128)


class Graph:
    """One step on the tensors of one batch. It is recorded on a filled batch, and leaves it as it was.

    Graphs of one rollout share their memory, `pool`: they run one after another, and what they return is copied."""

    def __init__(self, step: Step, batch: Batch, pool: Any = None):
        self.batch = batch
        self.draws = torch.zeros(batch.rows, dtype=torch.float64, device=batch.tokens.device)
        state = [tensor.clone() for tensor in _changing(batch)]
        with torch.cuda.device(batch.tokens.device):  # a capture is of the current device
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(batch, self.draws)  # what is compiled or allocated at the first call
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # Other threads, which pin memory for the loader, may go on meanwhile.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.columns = step(batch, self.draws)
        # Keys and values that the recording wrote are those that the first replay writes.
        for tensor, before in zip(_changing(batch), state, strict=True):
            tensor.copy_(before)

    @property
    def pool(self) -> Any:
        return self.graph.pool()

    def __call__(self, batch: Batch, draws: Tensor) -> Columns:
        assert batch is self.batch
        self.draws.copy_(draws)
        self.graph.replay()
        tokens, logp, sampling_logp = (column.clone() for column in self.columns)
        return tokens, logp, sampling_logp


def _changing(batch: Batch) -> list[Tensor]:
    """What a step changes."""
    tensors = [batch.tokens, batch.positions, batch.attention.suffix_lengths]
    return tensors if batch.seen is None else [*tensors, batch.seen]
