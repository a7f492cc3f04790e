"""One decode step in which a group reads its prefix once."""

import torch
from torch import Tensor

from vlmr1_kernels.linear import accumulation_dtype


def shared_prefix_decode(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: int | Tensor,
    *,
    scale: float,
) -> Tensor:
    batch, heads, head_dim = q.shape
    prompts, kv_heads, prefix_size, _ = prefix_k.shape
    members, folded = batch // prompts, heads // kv_heads
    if isinstance(suffix_lengths, int):
        suffix_k, suffix_v = suffix_k[:, :, :suffix_lengths], suffix_v[:, :, :suffix_lengths]
    suffix_size = suffix_k.shape[2]
    q = q * scale

    # The queries of a group, and of the heads that share a key head, are the rows of one matmul.
    grouped = q.reshape(prompts, members, kv_heads, folded, head_dim).transpose(1, 2)
    grouped = grouped.reshape(prompts * kv_heads, members * folded, head_dim)
    on_prefix = torch.bmm(grouped, prefix_k.flatten(0, 1).mT)  # [P * Hkv, G * H / Hkv, Lmax]
    on_prefix = on_prefix.view(prompts, kv_heads, members, folded, prefix_size).transpose(1, 2)
    own = q.reshape(batch * kv_heads, folded, head_dim)
    on_suffix = torch.bmm(own, suffix_k.flatten(0, 1).mT)  # [B * Hkv, H / Hkv, T]
    on_suffix = on_suffix.view(prompts, members, kv_heads, folded, suffix_size)

    scores = torch.cat([on_prefix, on_suffix], dim=-1)  # [P, G, Hkv, H / Hkv, Lmax + T]
    beyond = torch.arange(prefix_size, device=q.device) >= prefix_lengths[:, None]  # [P, Lmax]
    scores[..., :prefix_size].masked_fill_(beyond[:, None, None, None], -torch.inf)
    if isinstance(suffix_lengths, Tensor):
        beyond = torch.arange(suffix_size, device=q.device) >= suffix_lengths[:, None]  # [B, T]
        scores[..., prefix_size:].masked_fill_(beyond.view(prompts, members, 1, 1, -1), -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=accumulation_dtype(q.dtype)).to(q.dtype)

    of_prefix = weights[..., :prefix_size].transpose(1, 2)
    of_prefix = of_prefix.reshape(prompts * kv_heads, members * folded, prefix_size)
    out = torch.bmm(of_prefix, prefix_v.flatten(0, 1))
    out = out.view(prompts, kv_heads, members, folded, head_dim).transpose(1, 2).reshape(batch, heads, head_dim)
    of_suffix = weights[..., prefix_size:].reshape(batch * kv_heads, folded, suffix_size)
    return out + torch.bmm(of_suffix, suffix_v.flatten(0, 1)).view(batch, heads, head_dim)
