"""Merge of two attentions of the same query rows over different keys, by their log-sum-exps, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels.triton.launch import launch, on_tensor_device

BLOCK = {"ROWS": 32, "num_warps": 4}


@triton.jit(do_not_specialize=["heads", "length", "rows"])
def merge_rows_kernel(
    out, lse, more, more_lse, heads, length, rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merge a block of rows of a head, in the dtype of the log-sum-exps."""
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)  # heads are adjacent in memory, and so are their programs
    row = (program // heads) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    seen = row < rows
    place = lse + head * length + (length - rows) + row
    own = tl.load(place, mask=seen, other=0.0)
    other = tl.load(more_lse + head * rows + row, mask=seen, other=0.0)
    share = 1 / (1 + tl.exp(own - other))
    peak = tl.maximum(own, other)
    total = peak + tl.log(tl.exp(own - peak) + tl.exp(other - peak))

    column = tl.arange(0, BLOCK_D)
    mask = seen[:, None] & (column < HEAD_DIM)[None, :]
    offset = ((length - rows + row) * heads + head)[:, None] * HEAD_DIM + column[None, :]
    first = tl.load(out + offset, mask=mask, other=0.0).to(own.dtype)
    offset_more = (row * heads + head)[:, None] * HEAD_DIM + column[None, :]
    second = tl.load(more + offset_more, mask=mask, other=0.0).to(own.dtype)
    tl.debug_barrier()  # lanes of several warps read one log-sum-exp, which one of them overwrites
    tl.store(out + offset, (first + share[:, None] * (second - first)).to(out.dtype.element_ty), mask=mask)
    tl.store(place, total, mask=seen)


@on_tensor_device
def merge_rows(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Merge more [R, H, Dh], more_lse [H, R] into the last R rows of out [L, H, Dh], lse [H, L]; all contiguous."""
    length, heads, head_dim = out.shape
    rows = len(more)
    launch(
        merge_rows_kernel, triton.cdiv(rows, BLOCK["ROWS"]) * heads, out, lse, more, more_lse, heads, length, rows,
        HEAD_DIM=head_dim, BLOCK_D=triton.next_power_of_2(head_dim), **BLOCK,
    )  # fmt: skip
