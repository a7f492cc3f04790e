"""Allocations of Liger's operators, for dry runs: without Triton, on tensors without data.

Each launch is one operator `vlmr1_plan::...` here, so that a dispatch mode sees the tensors that it reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmr1.models.fused_layers import Operators

_LIBRARY = torch.library.Library("vlmr1_plan", "FRAGMENT")


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    torch.library.register_fake(f"{_LIBRARY.ns}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, _LIBRARY.ns), name)


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


_norm = _operator(
    "rms_norm(Tensor x, Tensor weight) -> (Tensor, Tensor)", lambda x, weight: (torch.empty_like(x), _statistics(x))
)
_norm_backward = _operator(
    "rms_norm_backward(Tensor(a!) dx, Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> Tensor",
    lambda dx, dy, x, weight, rstd: torch.empty_like(weight),
)
_add_norm = _operator(
    "add_rms_norm(Tensor residual, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
    lambda residual, x, weight: (torch.empty_like(residual), torch.empty_like(residual), _statistics(x)),
)
_add_norm_backward = _operator(
    "add_rms_norm_backward(Tensor dy, Tensor d_sum, Tensor sum, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    lambda dy, d_sum, sum, weight, rstd: (torch.empty_like(dy), torch.empty_like(weight)),
)
_layer_norm = _operator(
    "layer_norm(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)",
    lambda x, weight, bias: (torch.empty_like(x), _statistics(x), _statistics(x)),
)
_layer_norm_backward = _operator(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor)",
    lambda dy, x, weight, bias, mean, rstd: (torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)),
)
_swiglu = _operator("swiglu(Tensor gate, Tensor up) -> Tensor", lambda gate, up: torch.empty_like(gate))
_swiglu_backward = _operator(
    "swiglu_backward(Tensor(a!) gate, Tensor(b!) up, Tensor d_out) -> ()", lambda gate, up, d_out: None
)
_packed = _operator("swiglu_packed(Tensor both) -> Tensor", lambda both: both.new_empty(_halved(both)))
_packed_backward = _operator(
    "swiglu_packed_backward(Tensor both, Tensor d_out) -> Tensor", lambda both, d_out: torch.empty_like(both)
)
_rotate = _operator("rope(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin) -> ()", lambda q, k, cos, sin: None)


def _halved(both: Tensor) -> tuple[int, ...]:
    return *both.shape[:-1], both.shape[-1] // 2


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, in_place: bool) -> Tensor:
        y, rstd = _norm(x, weight)
        ctx.save_for_backward(x, weight, rstd)
        ctx.in_place = in_place
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy if ctx.in_place else torch.zeros_like(dy)
        return dx, _norm_backward(dx, dy, *ctx.saved_tensors), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, total, rstd = _add_norm(residual, x, weight)
        ctx.save_for_backward(total, weight, rstd)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_sum: Tensor) -> tuple[Tensor | None, ...]:
        dx, d_weight = _add_norm_backward(dy, d_sum, *ctx.saved_tensors)
        return dx, dx, d_weight, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, *statistics = _layer_norm(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, *statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *_layer_norm_backward(dy, *ctx.saved_tensors), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        _swiglu_backward(gate, up, d_out)
        return gate, up


class _PackedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return _packed(both)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        return _packed_backward(*ctx.saved_tensors, d_out)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *_rotated(dq, dk, *ctx.saved_tensors), None, None


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """In place where rows of all heads are contiguous, else of copies."""
    both = [each.transpose(1, 2).contiguous() for each in (q, k)]
    _rotate(*both, cos, sin)
    return tuple(each.transpose(1, 2) for each in both)


_FUNCTIONS: tuple[Any, ...] = (_RMSNorm, _AddRMSNorm, _LayerNorm, _SwiGLU, _PackedSwiGLU, _RoPE)
STAND_INS = Operators(*(each.apply for each in _FUNCTIONS))
