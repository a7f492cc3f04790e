"""The GEMMs of an output head, and the passes over the logits between them."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels.linear import add_to_weight, operand, project_into, to_hidden
from vlmr1_kernels.triton.launch import launch, readable
from vlmr1_kernels.triton.softmax import LAUNCH, ROW_ALIGNMENT, head_terms, row_statistics, write_gradient


@triton.jit(do_not_specialize=["first", "vocabulary"])
def statistics_kernel(
    logits, stride, targets, first, vocabulary, head, logp, entropy, lse, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    row = first + tl.program_id(0)
    line = logits + tl.program_id(0).to(tl.int64) * stride
    target = tl.load(targets + row)
    peak, log_sum, value, chosen = row_statistics(line, target, stride, vocabulary, head, ENTROPY, BLOCK)
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
    skipped = tl.program_id(0).to(tl.int64) * stride
    target, slope = tl.load(targets + row), tl.load(d_logp + row) * factor
    mean, entropy_slope = 0.0, None
    if d_entropy is not None:
        mean, entropy_slope = tl.load(entropy + row), tl.load(d_entropy + row) * factor
    write_gradient(
        logits + skipped, d_logits + skipped, target, stride, vocabulary,
        tl.load(lse + row), 0.0, mean, slope, entropy_slope, head, BLOCK,
    )  # fmt: skip


class Head:
    """An output head over the rows of a call, chunk by chunk: `project`, then the kernels, then `consume`.

    One buffer holds the logits of every chunk. Their gradient has the dtype of the GEMM operands: in float32
    it overwrites the logits.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        chunk: int,
        needs: tuple[bool, bool, bool] = (False, False, False),
        hidden_dtype: torch.dtype | None = None,
    ) -> None:
        """`needs`: gradients of hidden, weight, bias; `hidden_dtype`: that of d_hidden, if not that of hidden."""
        self.hidden, self.weight = hidden, operand(weight)
        self.targets, bias = readable(targets, bias)
        self.dtype, self.temperature = weight.dtype, temperature
        self.terms = head_terms(bias, temperature, softcap)
        rows, self.vocabulary, device = len(hidden), len(weight), hidden.device
        size = (min(rows, chunk), triton.cdiv(self.vocabulary, ROW_ALIGNMENT) * ROW_ALIGNMENT)
        self.logits = torch.empty(size, dtype=torch.float32, device=device)
        self.d_logits = self.logits
        if any(needs) and self.weight.dtype != torch.float32:
            self.d_logits = torch.empty(size, dtype=self.weight.dtype, device=device)
        self.d_hidden = torch.empty_like(hidden, dtype=hidden_dtype) if needs[0] else None
        # The first chunk writes d_weight, the others add to it.
        allocate = torch.empty if rows else torch.zeros
        self.d_weight = allocate(weight.shape, dtype=torch.float32, device=device) if needs[1] else None
        self.d_bias = torch.zeros(self.vocabulary, dtype=torch.float32, device=device) if needs[2] else None
        self.chunks = [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]

    def project(self, rows: slice) -> None:
        project_into(self.logits[: rows.stop - rows.start, : self.vocabulary], operand(self.hidden[rows]), self.weight)

    def run(self, kernel: Any, rows: slice, buffers: tuple[Tensor, ...], *args: Any, **constants: Any) -> None:
        """A kernel on a chunk, one program a row: it takes the buffers, what the head knows, then `args`."""
        known = (self.logits.stride(0), self.targets, rows.start, self.vocabulary, self.terms)
        launch(kernel, rows.stop - rows.start, *buffers, *known, *args, **LAUNCH, **constants)

    def statistics(self, rows: slice, logp: Tensor, entropy: Tensor | None, lse: Tensor) -> None:
        out = (logp, entropy, lse)
        self.run(statistics_kernel, rows, (self.logits,), *out, ENTROPY=entropy is not None)

    def gradient(
        self, rows: slice, lse: Tensor, entropy: Tensor | None, d_logp: Tensor, d_entropy: Tensor | None
    ) -> None:
        row = (lse, entropy, d_logp, d_entropy)
        self.run(gradient_kernel, rows, (self.logits, self.d_logits), *row, 1 / self.temperature)

    def consume(self, rows: slice) -> None:
        d_logits = self.d_logits[: rows.stop - rows.start, : self.vocabulary]
        if self.d_hidden is not None:
            self.d_hidden[rows] = to_hidden(d_logits, self.weight)
        if self.d_weight is not None:
            add_to_weight(self.d_weight, d_logits, operand(self.hidden[rows]), beta=min(rows.start, 1))
        if self.d_bias is not None:
            self.d_bias += d_logits.sum(0, dtype=torch.float32)

    def gradients(self, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """d_hidden, d_weight, d_bias times the factor, in the dtype of the weight; [0] where not needed."""
        self.logits = self.d_logits = self.logits.new_empty(0)  # room for the narrow copies

        def finished(gradient: Tensor | None) -> Tensor:
            if gradient is None:
                return self.weight.new_empty(0, dtype=self.dtype)
            return (gradient if factor is None else gradient.mul_(factor)).to(self.dtype)

        return finished(self.d_hidden), finished(self.d_weight), finished(self.d_bias)
