"""State of decode steps on the device, which the engine may keep from one generation to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmr1.rollout.graphs import Capacity, DecodeGraph, GraphKey, capture_size, new_pool
from vlmr1.rollout.kv_cache import KVCache
from vlmr1_kernels.linear import gemm_operand

# Captures of one generation: it begins without graphs, or with some. A decode step without a graph remains possible.
FIRST_CAPTURES, MORE_CAPTURES = 4, 2
# A padding row costs little, a capture as much as a dozen steps: a smaller graph has to be this many times smaller, and
# to be of use for more steps than these.
SHRINK, LEAST_STEPS = 4, 100
MOST_KEYS = 2  # sampling settings that have graphs: those of training, or of an evaluation, greedy and drawn

Capture = Callable[[Capacity, Any], DecodeGraph]  # (capacity, memory pool) -> graph


class DecodeState:
    """KV cache, the head's weight in the compute dtype, and CUDA graphs, which have baked in the addresses of both.

    `begin_generation` drops graphs whose weights have moved. Graphs of one cache share their memory."""

    def __init__(self, cache: KVCache, suppressed_ids: Tensor):
        self.cache, self.suppressed_ids = cache, suppressed_ids
        self.graphs: dict[GraphKey, list[DecodeGraph]] = {}
        self.captures_left = 0
        self.head: Tensor | None = None  # weight of the head in the compute dtype
        self._addresses: tuple[int, ...] = ()
        self._pool: Any = None

    def begin_generation(self, addresses: tuple[int, ...]) -> None:
        """Free all blocks, and drop the graphs if the weights are not at the addresses of the last generation."""
        self.cache.free_all()
        if addresses != self._addresses:
            self.drop_graphs()
            self.head = None
        self._addresses = addresses
        self.captures_left = MORE_CAPTURES if any(self.graphs.values()) else FIRST_CAPTURES

    def drop_graphs(self) -> None:
        """Free the graphs and their memory."""
        self.graphs.clear()

    def head_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the present values of the head's weight as a half-precision operand, at the same address in every
        call; None in float32, where the head itself computes the logits."""
        if dtype.itemsize >= 4:
            return None
        if self.head is None:
            self.head = gemm_operand(weight.to(dtype))
        elif self.head.data_ptr() != weight.data_ptr():
            self.head.copy_(weight if self.head.dtype == dtype else weight.to(dtype))
        return self.head

    def graph(
        self, key: GraphKey, needed: Capacity, limit: Capacity, capture: Capture, *, steps_left: int
    ) -> DecodeGraph | None:
        """Return the smallest graph that holds a batch of size `needed`, captured now where that pays; None if there is
        none and this generation has had its captures.

        `limit`: size of the largest batch of this generation, as far as it is known; `steps_left`: steps that a batch
        of so few rows may be decoded, 0 while groups wait."""
        graphs = self.graphs.setdefault(key, [])
        fitting = [each for each in graphs if each.capacity.holds(needed)]
        best = min(fitting, key=lambda each: each.capacity.rows, default=None)
        shrinks = best is not None and needed.rows * SHRINK <= best.capacity.rows and steps_left > LEAST_STEPS
        if (best is None or shrinks) and self.captures_left:
            return self._captured(key, needed, limit, capture)
        return best

    def _captured(self, key: GraphKey, needed: Capacity, limit: Capacity, capture: Capture) -> DecodeGraph:
        """Capture a graph for `needed`, with room for more rows if no graph had enough for them."""
        graphs, rows = self.graphs[key], needed.rows
        largest = max((each.capacity.rows for each in graphs), default=0)
        if 0 < largest < rows:  # rows grow as groups are admitted: twice as many each time
            rows = max(rows, min(limit.rows, 2 * largest))
        rows = capture_size(rows)
        capacity = replace(limit, rows=rows, groups=min(rows, limit.groups))
        replaced = [each for each in graphs if each.capacity.rows == rows]  # too small in another size
        for each in replaced:
            capacity = capacity.union(each.capacity)
        if not any(self.graphs.values()):
            self._pool = new_pool()  # the allocator takes no pool again whose graphs are all gone
        graphs.append(capture(capacity, self._pool))
        graphs[:] = [each for each in graphs if each not in replaced]
        self.captures_left -= 1
        others = [other for other in self.graphs if other != key]
        for other in others[: len(self.graphs) - MOST_KEYS]:
            del self.graphs[other]
        return graphs[-1]
