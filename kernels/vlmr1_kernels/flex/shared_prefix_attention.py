"""Shared-prefix attention as FlexAttention over a block mask, compiled once for all layouts."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vlmr1_kernels.flex.mask import BLOCK, Tables, tables
from vlmr1_kernels.layout import PrefixLayout


def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *,
    scale: float, softcap: float | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    for x in (q, k, v):  # else a size and an equal number of blocks could share one symbol
        torch._dynamo.mark_static(x, [0, 1, 3])
    # As strings: floats would become symbols, which the kernels do not support.
    numbers = repr(scale), None if softcap is None else repr(softcap)
    return _compiled()(q, k, v, tables(layout, window, q.device), *numbers)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    # A graph break would run it unfused, with all scores in memory.
    return torch.compile(attend, dynamic=True, fullgraph=True)


def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tables, scale: str, softcap: str | None) -> Tensor:
    """Return the attention; this function is compiled."""

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return ((key >= rows.own_start[row]) & (key <= row)) | (
            (key >= rows.prefix_start[row]) & (key < rows.prefix_end[row])
        )

    mask = BlockMask(
        (q.shape[2], k.shape[2]),
        rows.key_counts, rows.keys, rows.full_key_counts, rows.full_keys,
        rows.query_counts, rows.queries, rows.full_query_counts, rows.full_queries,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible,
    )  # fmt: skip
    return flex_attention(
        q,
        k,
        v,
        score_mod=None if softcap is None else _capped(float(softcap)),
        block_mask=mask,
        scale=float(scale),
        enable_gqa=q.shape[1] != k.shape[1],
        # The decoding kernel, otherwise chosen for short rows, requires H / Hkv to be a power of two.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
