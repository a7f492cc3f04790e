"""Prefix-tree attention of packed groups, with a dense mask."""

from functools import lru_cache

import torch
from torch import Tensor

from vlmr1_kernels.layout import PrefixLayout
from vlmr1_kernels.linear import accumulation_dtype


def shared_prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *,
    scale: float, softcap: float | None = None, window: int | None = None,
) -> Tensor:  # fmt: skip
    _, heads, length, head_dim = q.shape
    kv_heads = k.shape[1]
    wide = accumulation_dtype(q.dtype)
    queries = q.reshape(kv_heads, heads // kv_heads, length, head_dim).to(wide)
    keys, values = (x.reshape(kv_heads, 1, length, head_dim).to(wide) for x in (k, v))
    scores = scale * (queries @ keys.mT)  # [Hkv, H / Hkv, L, L]
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(layout, window).to(q.device), -torch.inf)
    return (scores.softmax(dim=-1) @ values).reshape(1, heads, length, head_dim).to(q.dtype)


@lru_cache(maxsize=4)
def visible(layout: PrefixLayout, window: int | None = None) -> Tensor:
    """Return the mask [L, L] bool: True if row i attends to row j."""
    prompts, branches = layout.prompt_lengths, layout.branch_lengths
    groups = torch.arange(layout.num_groups)
    sizes = prompts, [sum(lengths) for lengths in branches]
    group = torch.cat([groups.repeat_interleave(torch.tensor(each)) for each in sizes])  # [L]
    flat = torch.tensor([0, *(length for lengths in branches for length in lengths)])
    branch = torch.arange(len(flat)).repeat_interleave(flat)
    branch = torch.cat([torch.zeros(layout.prompt_total, dtype=torch.long), branch])  # [L], 0: prompt
    past = torch.ones(layout.total_length, layout.total_length, dtype=torch.bool).tril()
    same_branch = (branch[:, None] == branch) | (branch == 0)
    seen = past & (group[:, None] == group) & same_branch
    if window is None:
        return seen
    position = seen.sum(dim=1)  # [L] position in prompt + branch, from 1
    return seen & (position[:, None] - position < window)
