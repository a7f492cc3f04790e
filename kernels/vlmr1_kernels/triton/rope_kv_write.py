"""Rotary embedding and KV write of a decode step in one launch: a program has one head of one token."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmr1_kernels import custom_decode_ops
from vlmr1_kernels.triton.launch import launch, on_tensor_device

NUM_WARPS = 1  # a lane has 4 of 128 columns


@triton.jit
def rotate_row(
    source, norm, cos, sin, target, eps,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the rotated row at `source` [Dh] to `target`, after an RMS norm where a weight is given."""
    column = tl.arange(0, BLOCK)
    inside, turned = column < HEAD_DIM, column < ROTARY
    if INTERLEAVED:
        first = column % 2 == 0
        other = column ^ 1
    else:
        first = column < ROTARY // 2
        other = tl.where(first, column + ROTARY // 2, column - ROTARY // 2)
    x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + other, mask=turned, other=0.0).to(tl.float32)
    if norm is not None:
        scale = tl.rsqrt(tl.sum(x * x, 0) / HEAD_DIM + eps)
        x = x * scale * tl.load(norm + column, mask=inside, other=0.0).to(tl.float32)
        y = y * scale * tl.load(norm + other, mask=turned, other=0.0).to(tl.float32)
    c = tl.load(cos + column, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + column, mask=turned, other=0.0).to(tl.float32)
    out = x * c + tl.where(first, -y, y) * s
    tl.store(target + column, out.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["heads", "kv_heads"])
def rope_kernel(
    q, k, v, cos, sin, keys, values, rows, q_norm, k_norm, out,
    q_strides, k_strides, v_strides, key_strides, value_strides, heads, kv_heads, eps,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs of a token: its query heads, its key heads, its value heads."""
    program = tl.program_id(0)
    token = (program // (heads + 2 * kv_heads)).to(tl.int64)
    head = (program % (heads + 2 * kv_heads)).to(tl.int64)
    cos, sin = cos + token * ROTARY, sin + token * ROTARY
    if head < heads:
        rotate_row(
            q + token * q_strides[0] + head * q_strides[1], q_norm, cos, sin, out + (token * heads + head) * HEAD_DIM,
            eps, HEAD_DIM, ROTARY, INTERLEAVED, BLOCK,
        )  # fmt: skip
    else:
        row = tl.load(rows + token)
        head -= heads
        if head < kv_heads:
            rotate_row(
                k + token * k_strides[0] + head * k_strides[1], k_norm, cos, sin,
                keys + head * key_strides[0] + row * key_strides[1], eps, HEAD_DIM, ROTARY, INTERLEAVED, BLOCK,
            )  # fmt: skip
        else:
            head -= kv_heads
            column = tl.arange(0, BLOCK)
            value = tl.load(v + token * v_strides[0] + head * v_strides[1] + column, mask=column < HEAD_DIM)
            place = values + head * value_strides[0] + row * value_strides[1]
            tl.store(place + column, value, mask=column < HEAD_DIM)


@on_tensor_device
def _forward(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, rows: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float, interleaved: bool,
) -> Tensor:  # fmt: skip
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    out = torch.empty(tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    norms: Any = (None if norm is None else norm.contiguous() for norm in (q_norm, k_norm))
    if tokens:
        launch(
            rope_kernel, tokens * (heads + 2 * kv_heads),
            q, k, v, cos.contiguous(), sin.contiguous(), keys, values, rows.contiguous(), *norms, out,
            *(each.stride()[:2] for each in (q, k, v, keys, values)), heads, kv_heads, eps,
            HEAD_DIM=head_dim, ROTARY=cos.shape[1], INTERLEAVED=interleaved,
            BLOCK=triton.next_power_of_2(head_dim), num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


rope_kv_write = custom_decode_ops.rope_kv_write("triton", _forward)
