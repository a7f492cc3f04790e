"""An output head in chunks: GEMMs, and kernels over the logits between them."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels.inputs import HeadInputs, Needs
from vlmr1_kernels.linear import accumulate_weight_grad, gemm_operand, hidden_grad, project_into
from vlmr1_kernels.triton.launch import contiguous_aligned, launch
from vlmr1_kernels.triton.softmax import LAUNCH, ROW_ALIGNMENT, head_terms, row_statistics, write_gradient


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
    """Output head over the rows of a call. For each chunk: `project`, kernels over the logits, `consume`.

    All chunks share one buffer of logits. The gradient of the logits has the dtype of the GEMM operands; in float32 it
    overwrites the logits.
    """

    def __init__(
        self,
        inputs: HeadInputs,
        chunk: int,
        needs: Needs = (False, False, False),
        hidden_dtype: torch.dtype | None = None,
    ) -> None:
        """`needs`: gradients of hidden, weight, bias to compute; `hidden_dtype`: dtype of d_hidden, None: of hidden."""
        hidden, weight, bias, targets, temperature, softcap = inputs
        self.hidden, self.weight = hidden, gemm_operand(weight)
        self.targets, bias = contiguous_aligned(targets, bias)
        self.dtype, self.temperature = weight.dtype, temperature
        self.terms = head_terms(bias, temperature, softcap)
        rows, self.vocabulary, device = len(hidden), len(weight), hidden.device
        size = (min(rows, chunk), triton.cdiv(self.vocabulary, ROW_ALIGNMENT) * ROW_ALIGNMENT)
        self.logits = torch.empty(size, dtype=torch.float32, device=device)
        self.d_logits = self.logits
        if any(needs) and self.weight.dtype != torch.float32:
            self.d_logits = torch.empty(size, dtype=self.weight.dtype, device=device)
        self.d_hidden = torch.empty_like(hidden, dtype=hidden_dtype) if needs[0] else None
        # The first chunk overwrites d_weight, the others add to it.
        allocate = torch.empty if rows else torch.zeros
        self.d_weight = allocate(weight.shape, dtype=torch.float32, device=device) if needs[1] else None
        self.d_bias = torch.zeros(self.vocabulary, dtype=torch.float32, device=device) if needs[2] else None
        self.chunks = [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]

    def project(self, rows: slice) -> None:
        """Compute the logits of a chunk."""
        project_into(
            self.logits[: rows.stop - rows.start, : self.vocabulary], gemm_operand(self.hidden[rows]), self.weight
        )

    def run(self, kernel: Any, rows: slice, buffers: tuple[Tensor, ...], *args: Any, **constants: Any) -> None:
        """Launch a kernel on a chunk, one program per row, with `buffers`, the arguments of the head, and `args`."""
        common = (self.logits.stride(0), self.targets, rows.start, self.vocabulary, self.terms)
        launch(kernel, rows.stop - rows.start, *buffers, *common, *args, **LAUNCH, **constants)

    def statistics(self, rows: slice, logp: Tensor, entropy: Tensor | None, lse: Tensor) -> None:
        """Write log-prob, entropy if not None, and log-sum-exp of the rows of a chunk."""
        out = (logp, entropy, lse)
        self.run(statistics_kernel, rows, (self.logits,), *out, ENTROPY=entropy is not None)

    def gradient(
        self, rows: slice, lse: Tensor, entropy: Tensor | None, d_logp: Tensor, d_entropy: Tensor | None
    ) -> None:
        """Turn the logits of a chunk into their gradient."""
        row = (lse, entropy, d_logp, d_entropy)
        self.run(gradient_kernel, rows, (self.logits, self.d_logits), *row, 1 / self.temperature)

    def consume(self, rows: slice) -> None:
        """Multiply the gradient of a chunk's logits into d_hidden, d_weight and d_bias."""
        d_logits = self.d_logits[: rows.stop - rows.start, : self.vocabulary]
        if self.d_hidden is not None:
            self.d_hidden[rows] = hidden_grad(d_logits, self.weight)
        if self.d_weight is not None:
            accumulate_weight_grad(self.d_weight, d_logits, gemm_operand(self.hidden[rows]), beta=min(rows.start, 1))
        if self.d_bias is not None:
            self.d_bias += d_logits.sum(0, dtype=torch.float32)

    def gradients(self, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return d_hidden, d_weight, d_bias times `factor` in the dtype of the weight; [0] if not needed."""
        self.logits = self.d_logits = self.logits.new_empty(0)  # free memory for the casts

        def cast(gradient: Tensor | None) -> Tensor:
            if gradient is None:
                return self.weight.new_empty(0, dtype=self.dtype)
            return (gradient if factor is None else gradient.mul_(factor)).to(self.dtype)

        return cast(self.d_hidden), cast(self.d_weight), cast(self.d_bias)
