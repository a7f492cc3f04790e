"""Decode steps as CUDA graphs: one launch in place of thousands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmr1.rollout.sequences import Batch

CAPTURE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
StepOutput = tuple[Tensor, Tensor, Tensor]  # tokens, logp and sampling_logp [S] of one step
Step = Callable[[Batch, Tensor], StepOutput]  # (filled batch, random numbers [S]) -> output


def capture_size(rows: int) -> int:
    """Return the smallest capture size of at least `rows`: one of `CAPTURE_SIZES`, or a multiple of 128."""
    return next((size for size in CAPTURE_SIZES if size >= rows), -(-rows // 128) * 128)


class DecodeGraph:
    """A decode step captured on a filled batch, whose tensors it leaves as they were.

    Graphs of one rollout share their memory `pool`: they run one after another, and outputs are copied."""

    def __init__(self, step: Step, batch: Batch, pool: Any = None):
        self.batch = batch
        self.draws = torch.zeros(batch.rows, dtype=torch.float64, device=batch.tokens.device)
        state = [tensor.clone() for tensor in _mutated_tensors(batch)]
        with torch.cuda.device(batch.tokens.device):  # capture is on the current device
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step(batch, self.draws)  # warm-up: compilation and lazy allocations
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            # thread_local: the data loader's threads may pin memory during the capture.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.output = step(batch, self.draws)
        # The cache needs no restoring: the first replay writes the rows that the capture wrote.
        for tensor, before in zip(_mutated_tensors(batch), state, strict=True):
            tensor.copy_(before)

    @property
    def pool(self) -> Any:
        """Memory pool of the graph."""
        return self.graph.pool()

    def __call__(self, batch: Batch, draws: Tensor) -> StepOutput:
        """Replay the step on its batch with random numbers `draws` [S]."""
        assert batch is self.batch
        self.draws.copy_(draws)
        self.graph.replay()
        tokens, logp, sampling_logp = (column.clone() for column in self.output)
        return tokens, logp, sampling_logp


def _mutated_tensors(batch: Batch) -> list[Tensor]:
    tensors = [batch.tokens, batch.positions, batch.attention.suffix_lengths]
    return tensors if batch.seen is None else [*tensors, batch.seen]
