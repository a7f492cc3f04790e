"""An output head in chunks: GEMMs, and kernels over the logits between them."""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels.inputs import HeadInputs, Needs
from vlmr1_kernels.linear import accumulate_weight_grad, gemm_operand, hidden_grad, project_into, weight_grad
from vlmr1_kernels.triton.launch import contiguous_aligned, launch
from vlmr1_kernels.triton.softmax import ROW_ALIGNMENT, head_terms, launch_options, row_statistics, write_gradient


@triton.jit(do_not_specialize=["first", "vocabulary"])
def statistics_kernel(
    logits, stride, targets, first, vocabulary, head, logp, entropy, lse, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    row = first + tl.program_id(0)
    row_logits = logits + tl.program_id(0).to(tl.int64) * stride
    target = tl.load(targets + row)
    peak, log_sum, value, chosen = row_statistics(row_logits, target, stride, vocabulary, head, ENTROPY, BLOCK)
    tl.store(logp + row, chosen)
    tl.store(lse + row, peak + log_sum)
    if ENTROPY:
        tl.store(entropy + row, value)


@triton.jit(do_not_specialize=["first", "vocabulary"])
def gradient_kernel(
    logits, d_logits, stride, targets, first, vocabulary, head, lse, entropy, d_logp, d_entropy, factor,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0)
    offset = tl.program_id(0).to(tl.int64) * stride
    target, slope = tl.load(targets + row), tl.load(d_logp + row) * factor
    mean, entropy_slope = 0.0, None
    if d_entropy is not None:
        mean, entropy_slope = tl.load(entropy + row), tl.load(d_entropy + row) * factor
    write_gradient(
        logits + offset, d_logits + offset, target, stride, vocabulary,
        tl.load(lse + row), 0.0, mean, slope, entropy_slope, head, BLOCK,
    )  # fmt: skip


class Head:
    """Output head over the rows of a call. For each chunk of a block: `project`, kernels over the logits. For each
    block: `consume`.

    All chunks share one buffer of logits, all blocks one of their gradient, which has the dtype of the GEMM operands.
    In float32 a block is one chunk, and the gradient overwrites the logits.
    """

    def __init__(
        self,
        inputs: HeadInputs,
        chunks: Sequence[int],
        needs: Needs = (False, False, False),
        hidden_dtype: torch.dtype | None = None,
    ) -> None:
        """`chunks`: rows to project and rows to consume at once, the second a multiple of the first; `needs`: gradients
        of hidden, weight, bias to compute; `hidden_dtype`: dtype of d_hidden, None: of hidden."""
        hidden, weight, bias, targets, temperature, softcap = inputs
        self.hidden, self.weight = hidden, gemm_operand(weight.to(hidden.dtype))
        self.targets, bias = contiguous_aligned(targets, bias)
        self.temperature, self.weight_dtype = temperature, weight.dtype
        self.terms, self.options = head_terms(bias, temperature, softcap), launch_options(hidden.device, softcap)
        rows, self.vocabulary, device = len(hidden), len(weight), hidden.device
        narrow = self.weight.dtype != torch.float32
        self.chunk, self.block = chunks[0], chunks[1] if narrow else chunks[0]
        width = triton.cdiv(self.vocabulary, ROW_ALIGNMENT) * ROW_ALIGNMENT
        self.logits = torch.empty(min(rows, self.chunk), width, dtype=torch.float32, device=device)
        self.d_logits = self.logits
        if any(needs) and narrow:
            self.d_logits = torch.empty(min(rows, self.block), width, dtype=self.weight.dtype, device=device)
        self.d_hidden = torch.empty_like(hidden, dtype=hidden_dtype) if needs[0] else None
        self.d_weight: Tensor | None = None
        # A single block of bfloat16 is summed in float32 within its GEMM. Else the first block overwrites the sums.
        self.summed_at_once = rows <= self.block and hidden_dtype is None and self.weight.dtype == weight.dtype
        self.summed_at_once &= weight.dtype == torch.bfloat16 and rows > 0 and needs[1]
        if needs[1] and not self.summed_at_once:
            allocate = torch.empty if rows else torch.zeros
            self.d_weight = allocate(weight.shape, dtype=torch.float32, device=device)
        self.d_bias = torch.zeros(self.vocabulary, dtype=torch.float32, device=device) if needs[2] else None
        self.blocks = [
            _slices(start, min(start + self.block, rows), self.chunk) for start in range(0, rows, self.block)
        ]

    def gradient_buffers(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the logits of a chunk, and the place of their gradient in that of its block."""
        return self.logits, self.d_logits[rows.start % self.block :]

    def project(self, rows: slice) -> None:
        """Compute the logits of a chunk."""
        project_into(
            self.logits[: rows.stop - rows.start, : self.vocabulary], gemm_operand(self.hidden[rows]), self.weight
        )

    def run(self, kernel: Any, rows: slice, buffers: tuple[Tensor, ...], *args: Any, **constants: Any) -> None:
        """Launch a kernel on a chunk, one program per row, with `buffers`, the arguments of the head, and `args`."""
        common = (self.logits.stride(0), self.targets, rows.start, self.vocabulary, self.terms)
        launch(kernel, rows.stop - rows.start, *buffers, *common, *args, **self.options, **constants)

    def statistics(self, rows: slice, logp: Tensor, entropy: Tensor | None, lse: Tensor) -> None:
        """Write log-prob, entropy if not None, and log-sum-exp of the rows of a chunk."""
        out = (logp, entropy, lse)
        self.run(statistics_kernel, rows, (self.logits,), *out, ENTROPY=entropy is not None)

    def gradient(
        self, rows: slice, lse: Tensor, entropy: Tensor | None, d_logp: Tensor, d_entropy: Tensor | None
    ) -> None:
        """Turn the logits of a chunk into their gradient."""
        row = (lse, entropy, d_logp, d_entropy)
        self.run(gradient_kernel, rows, self.gradient_buffers(rows), *row, 1 / self.temperature)

    def consume(self, block: Sequence[slice]) -> None:
        """Multiply the gradient of a block's logits into d_hidden, d_weight and d_bias."""
        rows = slice(block[0].start, block[-1].stop)
        d_logits = self.d_logits[: rows.stop - rows.start, : self.vocabulary]
        if rows.stop == len(self.hidden):
            self.logits = self.logits.new_empty(0)  # free memory for the gradients
        if self.d_hidden is not None:
            self.d_hidden[rows] = hidden_grad(d_logits, self.weight)
        if self.summed_at_once:
            self.d_weight = weight_grad(d_logits, gemm_operand(self.hidden[rows]))
        elif self.d_weight is not None:
            accumulate_weight_grad(self.d_weight, d_logits, gemm_operand(self.hidden[rows]), beta=min(rows.start, 1))
        if self.d_bias is not None:
            self.d_bias += d_logits.sum(0, dtype=torch.float32)

    def gradients(self, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return d_hidden, d_weight, d_bias times `factor`; [0] if not needed. d_weight has the dtype of the given
        weight, the others that of hidden."""
        self.logits = self.d_logits = self.logits.new_empty(0)  # free memory for the casts

        def cast(gradient: Tensor | None, dtype: torch.dtype) -> Tensor:
            if gradient is None:
                return self.hidden.new_empty(0, dtype=dtype)
            return (gradient if factor is None else gradient.mul_(factor)).to(dtype)

        dtype = self.hidden.dtype
        return cast(self.d_hidden, dtype), cast(self.d_weight, self.weight_dtype), cast(self.d_bias, dtype)


def _slices(start: int, stop: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
