"""Rotary embedding of a decode step's queries and keys, and the write of its keys and values to the KV cache."""

import torch
from torch import Tensor

from vlmr1_kernels.linear import accumulation_dtype


def rope_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, rows: Tensor,
    q_norm: Tensor | None, k_norm: Tensor | None, eps: float, interleaved: bool,
) -> Tensor:  # fmt: skip
    wide = accumulation_dtype(q.dtype)
    cos, sin = cos[:, None].to(wide), sin[:, None].to(wide)  # [S, 1, Dr]
    rotary = cos.shape[-1]

    def rotated(x: Tensor, norm: Tensor | None) -> Tensor:
        x = x.to(wide)
        if norm is not None:
            x = norm.to(wide) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
        turned, rest = x[..., :rotary], x[..., rotary:]
        if interleaved:
            other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
        else:
            other = torch.cat((-turned[..., rotary // 2 :], turned[..., : rotary // 2]), -1)
        turned = turned * cos + other * sin
        return (torch.cat((turned, rest), -1) if rest.shape[-1] else turned).to(q.dtype)

    keys.index_copy_(1, rows, rotated(k, k_norm).transpose(0, 1))
    values.index_copy_(1, rows, v.transpose(0, 1))
    return rotated(q, q_norm)
