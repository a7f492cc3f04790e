"""The GEMMs of an output head, a chunk of rows at a time: what every chunk-and-consume loop shares."""

import math

import torch
from torch import Tensor

_SMALLEST_CHUNK_MIB = 4.0  # below this a chunk's fixed costs exceed its arithmetic; it also fits an L2 cache
_LARGEST_CHUNK_MIB = 512.0
_LEAST_ROWS_CUDA = 1024  # every chunk reads and writes the whole [V, D] accumulator


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, sums and results."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(rows: int, weight: Tensor, chunk_mib: float | None) -> int:
    """How many rows to project at once: `chunk_mib` MiB of logits; by default an eighth of the rows, but
    enough to be worth a loop and bounded for any number of rows."""
    bytes_per_row = weight.shape[0] * accumulation_dtype(weight.dtype).itemsize
    if chunk_mib is not None:
        return max(1, int(chunk_mib * 2**20 / bytes_per_row))
    least = math.ceil(_SMALLEST_CHUNK_MIB * 2**20 / bytes_per_row)
    if weight.device.type == "cuda":
        least = max(least, _LEAST_ROWS_CUDA)
    most = int(_LARGEST_CHUNK_MIB * 2**20 / bytes_per_row)
    return max(least, min(most, math.ceil(rows / 8)))


def operand(matrix: Tensor) -> Tensor:
    """The matrix as the GEMMs read it. CPU GEMMs round their result to the dtype of the operands, so there
    half precision is widened; CUDA GEMMs write float32 from half operands."""
    return matrix if matrix.device.type == "cuda" else matrix.to(accumulation_dtype(matrix.dtype))


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, divisor: float) -> Tensor:
    """(hidden @ weight^T + bias) / divisor in the accumulation dtype, [n, V].

    A division: the GEMM's own factor would be the rounded reciprocal, one error shared by all logits.
    """
    wide = accumulation_dtype(weight.dtype)
    if weight.dtype != wide:
        logits = torch.mm(hidden, weight.T, out_dtype=wide)
        if bias is not None:
            logits.add_(bias)
    else:
        logits = hidden @ weight.T if bias is None else torch.addmm(bias.to(wide), hidden, weight.T)
    return logits if divisor == 1 else logits.div_(divisor)


def project_into(logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """logits [n, V] = hidden @ weight^T; rows of the logits may be padded."""
    if weight.dtype == logits.dtype:
        torch.mm(hidden, weight.T, out=logits)
    else:
        torch.mm(hidden, weight.T, out_dtype=logits.dtype, out=logits)


def to_hidden(d_logits: Tensor, weight: Tensor) -> Tensor:
    """d_logits @ weight in the accumulation dtype, [n, D]."""
    wide = accumulation_dtype(weight.dtype)
    if weight.dtype == wide:
        return d_logits @ weight
    return torch.mm(d_logits.to(weight.dtype), weight, out_dtype=wide)


def add_to_weight(accumulator: Tensor, d_logits: Tensor, hidden: Tensor, beta: int = 1) -> None:
    """accumulator [V, D] = beta * accumulator + d_logits^T @ hidden, without a [V, D] temporary; with beta 0 it
    may be uninitialized."""
    if hidden.dtype == accumulator.dtype:
        accumulator.addmm_(d_logits.T, hidden, beta=beta)
    else:
        narrow = d_logits.to(hidden.dtype)
        torch.addmm(accumulator, narrow.T, hidden, out_dtype=accumulator.dtype, beta=beta, out=accumulator)
