"""The ceilings of GPUs for `vlmr1 plan --time`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmr1.planner.work import Kernel

# Shares of the data sheet's peaks that large kernels are assumed to reach.
PRODUCTS_REACH, MEMORY_REACHES = 0.75, 0.9
LAUNCH_US, GRAPH_US = 5.0, 2.5  # time that a kernel takes at least: launched by PyTorch, and within a CUDA graph


@dataclass(frozen=True)
class Card:
    """Peaks of NVIDIA's data sheet, SXM version, without sparsity. `attention` is what was reported of FlashAttention 2
    in forward (arXiv:2307.08691 and arXiv:2407.08608)."""

    memory: float  # GiB that the driver reports
    bf16: float  # TFLOP/s
    float32: float  # TFLOP/s without TF32
    attention: float  # TFLOP/s, bf16
    bandwidth: float  # GB/s

    def seconds(self, kernel: Kernel, *, graph: bool) -> float:
        """Seconds of one kernel: the largest of its arithmetic, its memory traffic and its launch."""
        rate = PRODUCTS_REACH * (self.bf16 if kernel.half else self.float32)
        if kernel.kind == "attention" and kernel.half:
            rate = self.attention
        traffic = kernel.bytes / (MEMORY_REACHES * self.bandwidth * 1e9)
        return max(kernel.flops / (rate * 1e12), traffic, (GRAPH_US if graph else LAUNCH_US) * 1e-6)


CARDS: Mapping[str, Card] = {
    "a100": Card(79.2, bf16=312, float32=19.5, attention=200, bandwidth=2039),
    "h100": Card(79.6, bf16=989, float32=67, attention=350, bandwidth=3350),
    "h200": Card(139.8, bf16=989, float32=67, attention=350, bandwidth=4800),
}
