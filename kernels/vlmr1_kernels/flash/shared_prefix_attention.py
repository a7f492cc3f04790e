"""Shared-prefix attention as two variable-length flash calls.

The first is causal over all prompts and branches as separate sequences. In the second, the branch rows of each group
are one sequence that attends to the whole prompt. The results of branch rows are merged by their log-sum-exps. Backward
calls both flash backwards with the merged output and log-sum-exp, which reproduces the merged probabilities exactly.
"""

from functools import partial

import torch
from torch import Tensor

from vlmr1_kernels import custom_ops
from vlmr1_kernels.flash.kernels import KERNELS, empty_gradients, to_varlen, to_varlen_row_major
from vlmr1_kernels.flash.merge import merge_rows
from vlmr1_kernels.flash.sequences import PrefixCall, plan
from vlmr1_kernels.layout import PrefixLayout, layout_of


def _forward(name: str, q: Tensor, k: Tensor, v: Tensor, table: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    parts, flash = plan(layout_of(table), q.device), KERNELS[name].forward
    q, k, v = to_varlen_row_major(q), to_varlen(k), to_varlen(v)  # the output has the memory order of q
    causal, prefix, first = parts.causal, parts.prefix, parts.prompt_rows
    out, lse = flash(q, k, v, *causal.spans(causal), True, scale)  # [L, H, Dh], [H, L]
    if prefix is not None:
        keys, values = _prompts(k, first, prefix), _prompts(v, first, prefix)
        more = flash(q[first:], keys, values, *prefix.queries.spans(prefix.keys), False, scale)
        merge_rows(out, lse, *more)
    return out.transpose(0, 1)[None], lse


def _backward(
    name: str, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, table: Tensor, scale: float
) -> tuple[Tensor, ...]:
    parts, flash = plan(layout_of(table), q.device), KERNELS[name].backward
    d_out, q, out = (to_varlen_row_major(x) for x in (d_out, q, out))
    k, v = to_varlen(k), to_varlen(v)
    causal, prefix, first = parts.causal, parts.prefix, parts.prompt_rows
    gradients = flash(d_out, q, k, v, out, lse, *causal.spans(causal), True, scale)
    if prefix is not None:
        keys, values = _prompts(k, first, prefix), _prompts(v, first, prefix)
        d_rows, *d_prompts = flash(
            d_out[first:], q[first:], keys, values, out[first:], lse[:, first:].contiguous(),
            *prefix.queries.spans(prefix.keys), False, scale,
        )  # fmt: skip
        d_q, d_k, d_v = gradients
        if prefix.prompts is None:  # in one launch
            torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage]
                [d_q[first:], d_k[:first], d_v[:first]], [d_rows, *d_prompts]
            )
        else:
            d_q[first:].add_(d_rows)
            for gradient, more in zip((d_k, d_v), d_prompts, strict=True):
                gradient.index_add_(0, prefix.prompts, more)
    return tuple(gradient.transpose(0, 1)[None] for gradient in gradients)


def _prompts(x: Tensor, first: int, prefix: PrefixCall) -> Tensor:
    """Return the rows of the prompts that have branches."""
    return x[:first] if prefix.prompts is None else x.index_select(0, prefix.prompts)


_RUN = {
    name: custom_ops.attention(
        "shared_prefix_attention", name, "Tensor layout", partial(_forward, name), partial(_backward, name),
        empty_gradients,
    )
    for name in KERNELS
}  # fmt: skip


def _attention(name: str, q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, *, scale: float) -> Tensor:
    return _RUN[name](q, k, v, layout.table, scale)


flash, flash3, flash4 = (partial(_attention, name) for name in KERNELS)
