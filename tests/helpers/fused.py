"""Definitions of the operators of fused layers in plain torch, and a pass of a model with them."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models.fused_layers import Operators
from vlmr1.types import Pack


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, in_place: bool = False) -> Tensor:
    y = wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype)


def add_rms_norm(residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return rms_norm(residual + x, weight, eps), residual + x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, weight.shape, weight, bias, eps).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return (x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]).to(x.dtype)

    return rotated(q), rotated(k)


DEFINITIONS: Any = Operators(rms_norm, add_rms_norm, layer_norm, swiglu, lambda both: swiglu(*both.chunk(2, -1)), rope)


def counted(operators: Operators) -> tuple[Operators, Counter[str]]:
    """The operators, and how often each was called."""
    calls: Counter[str] = Counter()

    def wrapped(name: str, function: Any) -> Any:
        return lambda *args: calls.update([name]) or function(*args)

    return Operators(*(wrapped(*each) for each in operators._asdict().items())), calls


def run(model: Any, family: Any, pack: Pack, dtype: torch.dtype | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of the pack's completions, and the gradients of a weighted sum of them."""
    policy = PackedPolicy(model, family, temperature=1.0, dtype=dtype)
    model.zero_grad()
    with policy.attention():
        hidden, weight = policy.hidden_rows(pack), family.head(model).weight
        logits = wide(hidden @ weight.to(hidden.dtype).T)
        logp = logits.log_softmax(-1).gather(1, pack.targets[:, None])[:, 0]
        (logp * torch.linspace(-1, 2, len(logp))).sum().backward()
    return logp.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
