"""Attention within each sequence; adjacent sequences of equal length form a batch, without copies.

Reads the lengths from the device, which waits for it. Sorting the sequences into fewer batches does not pay on a CPU:
the copies take longer than the calls they save.
"""

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, *, scale: float) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    shapes = [(len(list(run)), length) for length, run in groupby(filter(None, lengths))]  # sequences, rows of each
    rows = [count * length for count, length in shapes]
    # Rows first, so that split and cat work on contiguous memory.
    packed = [x.squeeze(0).transpose(0, 1) for x in (q, k, v)]  # [L, H, Dh] each
    parts = ((x,) if len(rows) == 1 else x.split(rows) for x in packed)
    grouped = q.shape[1] != k.shape[1]
    outs = []
    for shape, *qkv in zip(shapes, *parts, strict=True):
        queries, keys, values = (x.view(*shape, *x.shape[1:]).transpose(1, 2) for x in qkv)  # [S, H, n, Dh]
        out = scaled_dot_product_attention(queries, keys, values, scale=scale, enable_gqa=grouped)
        outs.append(out.transpose(1, 2).flatten(0, 1))  # [S * n, H, Dh]
    joined = outs[0] if len(outs) == 1 else torch.cat(outs)
    return joined.transpose(0, 1).unsqueeze(0)
