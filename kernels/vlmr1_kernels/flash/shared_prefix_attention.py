"""Shared-prefix attention as two variable-length flash calls.

The first is causal over all prompts and branches as separate sequences. In the second, the branch rows of each group
are one sequence that attends to the whole prompt. The results of branch rows are merged by their log-sum-exps. Backward
calls both flash backwards with the merged output and log-sum-exp, which reproduces the merged probabilities exactly.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmr1_kernels.flash import kernels
from vlmr1_kernels.flash.kernels import to_varlen, to_varlen_row_major
from vlmr1_kernels.flash.sequences import Plan, PrefixCall, plan
from vlmr1_kernels.layout import PrefixLayout


def shared_prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float) -> Tensor:
    return _SharedPrefixAttention.apply(q, k, v, plan(layout, q.device), scale)


class _SharedPrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: Plan, scale: float) -> Tensor:
        q, k, v = to_varlen_row_major(q), to_varlen(k), to_varlen(v)  # the output has the memory order of q
        causal, prefix, first = parts.causal, parts.prefix, parts.prompt_rows
        out, lse = kernels.varlen_forward(q, k, v, *causal.spans(causal), True, scale)  # [L, H, Dh], [H, L]
        if prefix is not None:
            keys, values = _prompts(k, first, prefix), _prompts(v, first, prefix)
            more, more_lse = kernels.varlen_forward(
                q[first:], keys, values, *prefix.queries.spans(prefix.keys), False, scale
            )
            own_lse = lse[:, first:]  # [H, R]
            share = torch.sigmoid(more_lse - own_lse).T[..., None]  # [R, H, 1]
            merged = torch.lerp(out[first:].to(share.dtype), more.to(share.dtype), share)
            out[first:] = merged
            torch.logaddexp(own_lse, more_lse, out=own_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.parts, ctx.scale = parts, scale
        return out.transpose(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        parts: Plan = ctx.parts
        causal, prefix, first = parts.causal, parts.prefix, parts.prompt_rows
        d_out = to_varlen_row_major(d_out)
        d_q, d_k, d_v = kernels.varlen_backward(d_out, q, k, v, out, lse, *causal.spans(causal), True, ctx.scale)
        if prefix is not None:
            keys, values = _prompts(k, first, prefix), _prompts(v, first, prefix)
            more = kernels.varlen_backward(
                d_out[first:], q[first:], keys, values, out[first:], lse[:, first:].contiguous(),
                *prefix.queries.spans(prefix.keys), False, ctx.scale,
            )  # fmt: skip
            d_q[first:] += more[0]
            for gradient, rest in zip((d_k, d_v), more[1:], strict=True):
                if prefix.prompts is None:
                    gradient[:first] += rest
                else:
                    gradient.index_add_(0, prefix.prompts, rest)
        return *(gradient.transpose(0, 1)[None] for gradient in (d_q, d_k, d_v)), None, None


def _prompts(x: Tensor, first: int, prefix: PrefixCall) -> Tensor:
    """Return the rows of the prompts that have branches."""
    return x[:first] if prefix.prompts is None else x.index_select(0, prefix.prompts)
