"""GEMMs of an output head on chunks of rows."""

import math

import torch
from torch import Tensor

_SMALLEST_CHUNK_MIB = 4.0  # smaller chunks are dominated by fixed costs; fits an L2 cache
_LARGEST_CHUNK_MIB = 512.0
_LEAST_ROWS_CUDA = 1024
_CONSUMED_ROWS_CUDA = 4096  # each such GEMM reads and writes the whole float32 [V, D] accumulator


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, sums and results: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(hidden: Tensor, weight: Tensor, chunk_mib: float | None) -> tuple[int, int]:
    """Return how many rows to project at once, and the gradients of how many to consume at once.

    With `chunk_mib` both are that many MiB of logits. By default an eighth of the rows is projected, within bounds on
    the bytes, and `consumed_rows` are consumed."""
    rows, bytes_per_row = hidden.shape[0], weight.shape[0] * accumulation_dtype(weight.dtype).itemsize
    if chunk_mib is not None:
        chunk = max(1, int(chunk_mib * 2**20 / bytes_per_row))
        return chunk, chunk
    least = math.ceil(_SMALLEST_CHUNK_MIB * 2**20 / bytes_per_row)
    if weight.device.type == "cuda":
        least = max(least, _LEAST_ROWS_CUDA)
    most = int(_LARGEST_CHUNK_MIB * 2**20 / bytes_per_row)
    chunk = max(least, min(most, math.ceil(rows / 8)))
    return chunk, consumed_rows(hidden, weight, chunk)


def consumed_rows(hidden: Tensor, weight: Tensor, chunk: int) -> int:
    """Return how many rows to consume at once, a multiple of the `chunk` that is projected at once.

    More rows than a chunk save accumulator traffic on CUDA, and take memory for half-precision gradients of logits. All
    rows are consumed at once where these take no more memory than several blocks with an accumulator: a bfloat16
    weight then needs none. On CPUs chunks are consumed while they are in the cache. In float32 the gradient
    overwrites the logits of a chunk, and its GEMMs are slow beside the traffic."""
    trained = weight.requires_grad and torch.is_grad_enabled()
    if weight.device.type != "cuda" or hidden.dtype.itemsize != 2 or not trained:
        return chunk
    rows, block = hidden.shape[0], chunk * max(1, _CONSUMED_ROWS_CUDA // chunk)
    accumulator = 4 * weight.shape[1] // 2 if weight.dtype == torch.bfloat16 else 0  # in rows of gradients
    return chunk * math.ceil(rows / chunk) if block < rows <= block + accumulator else block


def gemm_operand(matrix: Tensor) -> Tensor:
    """Return the matrix as a GEMM operand.

    On CUDA half-precision operands have float32 results. CPU GEMMs round results to the dtype of the operands, so
    these are cast to the accumulation dtype."""
    return matrix if matrix.device.type == "cuda" else matrix.to(accumulation_dtype(matrix.dtype))


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, divisor: float) -> Tensor:
    """Return (hidden @ weight^T + bias) / divisor [n, V] in the accumulation dtype.

    Divides, since the GEMM's alpha would be a rounded reciprocal that biases all logits alike.
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
    """Write logits [n, V] = hidden @ weight^T; the rows of `logits` may be strided."""
    if weight.dtype == logits.dtype:
        torch.mm(hidden, weight.T, out=logits)
    else:
        torch.mm(hidden, weight.T, out_dtype=logits.dtype, out=logits)


def hidden_grad(d_logits: Tensor, weight: Tensor) -> Tensor:
    """Return d_logits @ weight [n, D] in the accumulation dtype."""
    wide = accumulation_dtype(weight.dtype)
    if weight.dtype == wide:
        return d_logits @ weight
    return torch.mm(d_logits.to(weight.dtype), weight, out_dtype=wide)


def accumulate_weight_grad(accumulator: Tensor, d_logits: Tensor, hidden: Tensor, beta: int = 1) -> None:
    """Compute accumulator [V, D] = beta * accumulator + d_logits^T @ hidden in place; with beta 0 the accumulator may
    be uninitialized."""
    if hidden.dtype == accumulator.dtype:
        accumulator.addmm_(d_logits.T, hidden, beta=beta)
    else:
        narrow = d_logits.to(hidden.dtype)
        torch.addmm(accumulator, narrow.T, hidden, out_dtype=accumulator.dtype, beta=beta, out=accumulator)


def weight_grad(d_logits: Tensor, hidden: Tensor) -> Tensor:
    """Return d_logits^T @ hidden [V, D] of half-precision operands in their dtype, rounded once from float32 sums."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False  # else parts of a sum may be rounded before they are added
    try:
        return d_logits.T @ hidden
    finally:
        matmul.allow_bf16_reduced_precision_reduction = allowed


def add_to_grad(weight: Tensor, gradient: Tensor, factor: Tensor, *, keep: bool) -> None:
    """Add `gradient * factor` to `weight.grad` in one pass. Overwrites the gradient where it can, unless `keep`."""
    factor = factor.to(gradient.dtype)
    if weight.grad is not None:
        weight.grad.addcmul_(gradient, factor)
    else:
        weight.grad = gradient * factor if keep else gradient.mul_(factor)
