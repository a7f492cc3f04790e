"""Registers implementations of the ops of a decode step as torch custom ops, as `custom_ops.py` does for training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmr1_kernels.custom_ops import COMPOSED, register
from vlmr1_kernels.inputs import DecodeTables, SamplingOptions

_SAMPLING = (  # fields of SamplingOptions
    "float temperature, bool greedy, int top_k, float top_p, float min_p, float repetition_penalty"
)
_TABLES = ", ".join(f"Tensor {field}" for field in DecodeTables._fields)


def shared_prefix_decode(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the op from forward(q, keys, values, tables, *, block, max_group, max_prefix, scale) -> [B, H, Dh]."""

    def run_forward(q: Tensor, keys: Tensor, values: Tensor, *others: Any) -> Tensor:
        *tables, block, max_group, max_prefix, scale = others
        bounds = {"max_group": max_group, "max_prefix": max_prefix}
        return forward(q, keys, values, DecodeTables(*tables), block=block, **bounds, scale=scale)

    def fake(q: Tensor, *others: Any) -> Tensor:
        return q.new_empty(q.shape)

    arguments = f"Tensor q, Tensor keys, Tensor values, {_TABLES}, int block, SymInt max_group, SymInt max_prefix"
    op = register(f"shared_prefix_decode_{name}", f"{arguments}, float scale", 1, run_forward, fake)
    COMPOSED[op] = run_forward

    def run(
        q: Tensor, keys: Tensor, values: Tensor, tables: DecodeTables, *,
        block: int, max_group: int, max_prefix: int, scale: float,
    ) -> Tensor:  # fmt: skip
        return op(q, keys, values, *tables, block, max_group, max_prefix, scale)

    return run


def sample_tokens(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the op from forward(logits [S, V], draws [S], suppressed_ids [n] | None, seen [S, V] | None, options)
    -> tokens [S] int64, logp [S] and sampling_logp [S], float32."""

    def fake(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        logp = logits.new_empty(logits.shape[:1], dtype=torch.float32)
        return torch.empty_like(logp, dtype=torch.int64), logp, torch.empty_like(logp)

    def call(*values: Any) -> Any:
        return forward(*values[:4], SamplingOptions(*values[4:]))

    arguments = f"Tensor logits, Tensor draws, Tensor? suppressed_ids, Tensor? seen, {_SAMPLING}"
    op = register(f"sample_tokens_{name}", arguments, 3, call, fake)

    def run(*tensors: Tensor | None, options: SamplingOptions) -> tuple[Tensor, Tensor, Tensor]:
        return op(*tensors, *options)

    return run


def rope_kv_write(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the op from a function of all its arguments, in the order of `decode_ops.rope_kv_write`."""

    def fake(q: Tensor, *others: Any) -> Tensor:
        return q.new_empty(q.shape)

    arguments = (
        "Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor rows, "
        "Tensor? q_norm, Tensor? k_norm, float eps, bool interleaved"
    )
    return register(f"rope_kv_write_{name}", arguments, 1, forward, fake)
