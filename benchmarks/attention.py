"""What the attention benchmarks share: tensors as a model's projections leave them, and a run with gradients.

The floor is one product of square matrices with as many operations as the visible pairs of rows need: two
products a pair forward, five backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.compare import Outputs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """ "16x2x128-bfloat16": H, Hkv, Dh and the dtype."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def parse(cls, sizes: str, dtype: str) -> Shape:
        heads, kv_heads, head_dim = (int(each) for each in sizes.split("x"))
        return cls(heads, kv_heads, head_dim, DTYPES[dtype])

    def flops(self, pairs: int) -> int:
        """Forward and backward over `pairs` of a query row and a key row that it sees."""
        return 7 * 2 * self.heads * self.head_dim * pairs

    def moved(self, rows: int) -> int:
        """Bytes of q, k, v, the output, and the gradients of all four."""
        return 4 * (self.heads + self.kv_heads) * rows * self.head_dim * self.dtype.itemsize


class Inputs:
    """q [1, H, L, Dh], k and v [1, Hkv, L, Dh] and the gradient of the output, random."""

    def __init__(self, shape: Shape, rows: int, device: str):
        generator = torch.Generator(device).manual_seed(3)

        def normal(heads: int) -> Tensor:
            drawn = torch.randn(1, rows, heads, shape.head_dim, device=device, generator=generator)
            return drawn.to(shape.dtype).transpose(1, 2)

        self.shape, self.device = shape, device
        self.q, self.d_out = normal(shape.heads), normal(shape.heads)
        self.k, self.v = normal(shape.kv_heads), normal(shape.kv_heads)

    def run(self, attention: Attention, dtype: torch.dtype | None = None) -> Outputs:
        """The output and the gradients of q, k, v."""
        leaves = [each.detach().to(dtype or each.dtype).requires_grad_() for each in (self.q, self.k, self.v)]
        out = attention(*leaves)
        gradients = torch.autograd.grad(out, leaves, self.d_out.to(out.dtype))
        return {"out": out.detach(), **dict(zip(("d_q", "d_k", "d_v"), gradients, strict=True))}

    def floor(self, flops: int) -> Callable[[], Outputs]:
        side = max(1, round((flops / 2) ** (1 / 3)))
        left, right = (torch.randn(side, side, device=self.device).to(self.shape.dtype) for _ in range(2))
        return lambda: {"product": left @ right}
