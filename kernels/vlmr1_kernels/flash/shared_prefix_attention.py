"""Packed prefix attention as two variable-length flash calls.

The first is causal over all rows, every prompt and every branch a sequence of its own. The second lets the
branch rows of each group, one sequence, look at their whole prompt. The branch rows' results are merged by
their log-sum-exps. Backward calls the flash backward of both with the merged output and log-sum-exp, from
which it rebuilds the merged probabilities: exact.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmr1_kernels.flash import kernels
from vlmr1_kernels.flash.kernels import loadable, rows_outermost
from vlmr1_kernels.flash.sequences import Plan, Shared, plan
from vlmr1_kernels.layout import PrefixLayout


def shared_prefix_attention(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float) -> Tensor:
    return _SharedPrefixAttention.apply(q, k, v, plan(layout, q.device), scale)


class _SharedPrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: Plan, scale: float) -> Tensor:
        q, k, v = rows_outermost(q), loadable(k), loadable(v)  # the output has the memory order of q
        own, shared, first = parts.own, parts.shared, parts.prompt_rows
        out, lse = kernels.varlen_forward(
            q, k, v, own.offsets, own.offsets, own.longest, own.longest, True, scale
        )  # [L, H, Dh], [H, L]
        if shared is not None:
            keys, values = _prompts(k, first, shared), _prompts(v, first, shared)
            more, more_lse = kernels.varlen_forward(q[first:], keys, values, *_spans(shared), False, scale)
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
        own, shared, first = ctx.parts.own, ctx.parts.shared, ctx.parts.prompt_rows
        d_out = rows_outermost(d_out)
        d_q, d_k, d_v = kernels.varlen_backward(
            d_out, q, k, v, out, lse, own.offsets, own.offsets, own.longest, own.longest, True, ctx.scale
        )
        if shared is not None:
            keys, values = _prompts(k, first, shared), _prompts(v, first, shared)
            more = kernels.varlen_backward(
                d_out[first:], q[first:], keys, values, out[first:], lse[:, first:].contiguous(),
                *_spans(shared), False, ctx.scale,
            )  # fmt: skip
            d_q[first:] += more[0]
            for gradient, rest in zip((d_k, d_v), more[1:], strict=True):
                if shared.prompts is None:
                    gradient[:first] += rest
                else:
                    gradient.index_add_(0, shared.prompts, rest)
        return *(gradient.transpose(0, 1)[None] for gradient in (d_q, d_k, d_v)), None, None


def _prompts(x: Tensor, first: int, shared: Shared) -> Tensor:
    """The prompt rows that branches look at."""
    return x[:first] if shared.prompts is None else x.index_select(0, shared.prompts)


def _spans(shared: Shared) -> tuple[Tensor, Tensor, int, int]:
    return shared.queries.offsets, shared.keys.offsets, shared.queries.longest, shared.keys.longest
