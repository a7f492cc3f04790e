"""Shared-prefix attention on torch's CPU flash kernels.

A branch row attends to two blocks of keys: causally to its branch, and to the whole prompt of its group. Each block is
one flash call; the results are merged by their log-sum-exps. Backward calls each block's flash backward with the merged
output and log-sum-exp, which reproduces the merged probabilities exactly.
"""

import torch
from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.cpu.groups import groups
from vlmr1_kernels.layout import PrefixLayout, layout_of
from vlmr1_kernels.linear import accumulation_dtype

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def shared_prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float) -> Tensor:
    return _run(q, k, v, layout.table, scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_last_contiguous(x) for x in (q, k, v))
    _, heads, length, head_dim = q.shape
    # Rows first in memory, the layout that models reshape to [L, H * Dh].
    out = q.new_empty(1, length, heads, head_dim).transpose(1, 2)
    lse = q.new_empty(1, length, heads, dtype=accumulation_dtype(q.dtype)).transpose(1, 2)  # [1, H, L]
    for group in groups(layout_of(table)):
        prompt, rows = group.prompt, group.rows
        keys, values = k[:, :, prompt], v[:, :, prompt]
        out[:, :, prompt], lse[:, :, prompt] = _flash(q[:, :, prompt], keys, values, 0.0, True, scale=scale)
        if not group.size:
            continue
        own, own_lse = _flash(*(group.split(x[:, :, rows]) for x in (q, k, v)), 0.0, True, scale=scale)
        own, own_lse = group.join(own), group.join(own_lse[..., None])[..., 0]  # [1, H, R, Dh], [1, H, R]
        shared, shared_lse = _flash(q[:, :, rows], keys, values, 0.0, False, scale=scale)
        share = torch.sigmoid(shared_lse - own_lse)[..., None]
        out[:, :, rows] = torch.lerp(own.to(share.dtype), shared.to(share.dtype), share)
        lse[:, :, rows] = torch.logaddexp(own_lse, shared_lse)
    return out, lse[0]


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, table: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, d_out = (_last_contiguous(x) for x in (q, k, v, d_out))
    lse = lse[None]
    d_q, d_k, d_v = _empty_gradients(q, k, v)
    for group in groups(layout_of(table)):
        prompt, rows = group.prompt, group.rows
        keys, values = k[:, :, prompt], v[:, :, prompt]
        d_q[:, :, prompt], d_keys, d_values = _flash_backward(
            d_out[:, :, prompt], q[:, :, prompt], keys, values, out[:, :, prompt], lse[:, :, prompt],
            0.0, True, scale=scale,
        )  # fmt: skip
        if group.size:
            own = _flash_backward(
                *(group.split(x[:, :, rows]) for x in (d_out, q, k, v, out)),
                group.split(lse[:, :, rows, None])[..., 0],
                0.0, True, scale=scale,
            )  # fmt: skip
            d_rows, d_k[:, :, rows], d_v[:, :, rows] = (group.join(x) for x in own)
            d_shared, more_keys, more_values = _flash_backward(
                d_out[:, :, rows], q[:, :, rows], keys, values, out[:, :, rows], lse[:, :, rows],
                0.0, False, scale=scale,
            )  # fmt: skip
            torch.add(d_rows, d_shared, out=d_q[:, :, rows])
            d_keys, d_values = d_keys + more_keys, d_values + more_values
        d_k[:, :, prompt], d_v[:, :, prompt] = d_keys, d_values
    return d_q, d_k, d_v


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (torch.empty_like(_last_contiguous(x)) for x in (q, k, v))
    return d_q, d_k, d_v


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_run = custom_ops.attention(
    "shared_prefix_attention", "cpu", "Tensor layout", _forward, _backward, _empty_gradients, lse_by_row=True
)
