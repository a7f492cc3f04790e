"""Bidirectional attention within concatenated sequences, with a dense mask."""

import torch
from torch import Tensor

from vlmr1_kernels.linear import accumulation_dtype


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, *, scale: float) -> Tensor:
    _, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    wide = accumulation_dtype(q.dtype)
    queries = q.reshape(kv_heads, heads // kv_heads, length, head_dim).to(wide)
    keys, values = (x.reshape(kv_heads, 1, length, head_dim).to(wide) for x in (k, v))
    rows = torch.arange(length, device=q.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, rows, right=True)  # [L]
    scores = scale * (queries @ keys.mT)  # [Hkv, H / Hkv, L, L]
    scores = scores.masked_fill(sequence[:, None] != sequence, -torch.inf)
    return (scores.softmax(dim=-1) @ values).reshape(1, heads, length, head_dim).to(q.dtype)
