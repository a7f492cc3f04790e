"""The weights that a decode step reads: parameters in place, or copies in the compute dtype at fixed addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Adapted:
    """A linear layer and the adapters that its forward adds: y = x W^T + b + scale * x A^T B^T."""

    weight: Tensor  # [O, D]
    bias: Tensor | None  # [O]
    adapters: Sequence[tuple[Tensor, Tensor, float]] = ()  # A [r, D], B [O, r], scale

    def tensors(self) -> list[Tensor]:
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        return own + [tensor for a, b, _ in self.adapters for tensor in (a, b)]


def adapters_of(module: Any) -> tuple[Adapted, str | None]:
    """Return a linear layer with its active LoRA adapters, and why its weights cannot be read as such, or None."""
    base = module.base_layer if hasattr(module, "lora_A") else module
    nothing = Adapted(torch.empty(0), None)
    if type(base) is not nn.Linear:
        return nothing, f"its linear layers are {type(base).__name__}"
    adapters = []
    if base is not module and not (module.disable_adapters or module.merged):
        for name in module.active_adapters:
            if name in module.lora_A:
                a, b = module.lora_A[name], module.lora_B[name]
                if name in module.lora_variant or type(a) is not nn.Linear or a.bias is not None or b.bias is not None:
                    return nothing, "its adapter is not a plain LoRA"
                adapters.append((a.weight, b.weight, module.scaling[name]))
    return Adapted(base.weight, base.bias, adapters), None


class StepWeights:
    """Tensors of a decode step. Between `begin` and `end` each is asked for by name, in any order."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.buffers: dict[str, Tensor] = {}
        self.moved = False  # whether an address has changed from one refresh to the next
        self.copies_all = False  # whether no weight of a product is read in place
        self._used: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []
        self.addresses: tuple[int, ...] = ()

    def begin(self) -> None:
        """Forget what a step read until now; buffers stay."""
        self._used, self._targets, self._sources, self.copies_all = [], [], [], True

    def in_place(self, tensor: Tensor) -> Tensor:
        """Return a parameter's tensor as it is."""
        self._used.append(tensor.detach())
        return self._used[-1]

    def operand(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of a product, concatenated in the first dimension, in the compute dtype."""
        if len(tensors) == 1 and tensors[0].dtype == self.dtype:
            self.copies_all &= tensors[0].dim() == 1
            return self.in_place(tensors[0])
        shape = (sum(len(each) for each in tensors), *tensors[0].shape[1:])
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape != shape:
            buffer = self.buffers[name] = tensors[0].new_empty(shape, dtype=self.dtype)
        self._targets += buffer.split([len(each) for each in tensors])
        self._sources += [each.detach() for each in tensors]
        return self.in_place(buffer)

    def end(self) -> None:
        """Fill the buffers, and note whether anything has another address than before."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)  # pyright: ignore[reportPrivateImportUsage]
        before, self.addresses = self.addresses, tuple(each.data_ptr() for each in self._used)
        self.moved |= bool(before) and before != self.addresses

    def release(self, keep_copies: bool) -> None:
        """Hold no tensor, but for the buffers where they are kept."""
        if not keep_copies:
            self.buffers.clear()
            self.addresses = ()  # new copies elsewhere are no move
        self.begin()


@dataclass(frozen=True)
class _Gemm:
    """One product: outputs [S, O] of layers behind one another, or [n, S, O] stacked."""

    weight: Tensor  # [O, D], or [n, O, D]
    bias: Tensor | None
    sizes: Sequence[int]  # of each layer's output
    adapters: Sequence[tuple[int | None, Tensor, Tensor, float]]  # layer (None: all), A, B, scale
    exact: bool

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        if self.weight.dim() == 3:
            out = torch.bmm(x.expand(len(self.weight), *x.shape), self.weight.mT)
            parts = out.unbind()
        else:
            out = F.linear(x, self.weight, self.bias)
            parts = out.split(self.sizes, 1) if len(self.sizes) > 1 else (out,)
        for index, a, b, scale in self.adapters:
            if self.exact:  # the operations of peft
                parts = tuple(
                    part + F.linear(F.linear(x, a), b) * scale if i == index else part for i, part in enumerate(parts)
                )
            elif index is None:
                out.baddbmm_(F.linear(x, a).expand(len(out), -1, -1), b.view(len(out), -1, b.shape[1]).mT, alpha=scale)
            else:
                parts[index].addmm_(F.linear(x, a), b.T, alpha=scale)
        return parts


class Projection:
    """Linear layers of one input. `merged`: in as few products as can be without copying large weights that are in the
    compute dtype; else in one product each.

    `stacked`: layers of equal size, whose outputs are contiguous. `halves`: one layer whose output is two of them."""

    def __init__(
        self, weights: StepWeights, place: str, modules: Mapping[str, Any], *,
        merged: bool, stacked: bool = False, halves: bool = False,
    ):  # fmt: skip
        layers = {f"{place}.{name}": adapters_of(module)[0] for name, module in modules.items()}
        self.halves = halves
        self.gemms: list[_Gemm] = []
        for names in computed_together(layers, weights.dtype, stacked) if merged else [[name] for name in layers]:
            members = {name: layers[name] for name in names}
            self.gemms.append(
                _gemm(weights, members, stacked and len(members) > 1, halves and merged, exact=not merged)
            )

    def __call__(self, x: Tensor) -> list[Tensor]:
        """[S, D] -> the output [S, O] of each layer, or both halves of the only one."""
        out = [part for gemm in self.gemms for part in gemm(x)]
        return list(out[0].chunk(2, 1)) if self.halves and len(out) == 1 else out


def computed_together(layers: Mapping[str, Adapted], dtype: torch.dtype, stacked: bool) -> list[list[str]]:
    """Return which layers are computed together. Of weights in the compute dtype only the two last of three are: those
    of keys and values, which are small."""
    names = list(layers)
    with_bias = sum(layers[name].bias is not None for name in names)
    if with_bias and (stacked or with_bias < len(names)):
        return [[name] for name in names]
    if any(layers[name].weight.dtype != dtype for name in names):
        return [names]
    return [names[:1], names[1:]] if len(names) == 3 else [[name] for name in names]


def _gemm(weights: StepWeights, members: Mapping[str, Adapted], stacked: bool, halves: bool, *, exact: bool) -> _Gemm:
    name, first = next(iter(members.items()))
    weight = weights.operand(f"{name}.weight", [each.weight for each in members.values()])
    halves = halves and first.bias is None
    if stacked or halves:
        weight = weight.view(2 if halves else len(members), -1, weight.shape[1])
    biases = [each.bias for each in members.values() if each.bias is not None]
    bias = weights.operand(f"{name}.bias", biases) if biases else None
    adapters = []
    for index, (key, each) in enumerate(members.items()):
        for i, (a, b, scale) in enumerate(each.adapters):
            a, b = weights.operand(f"{key}.A{i}", [a]), weights.operand(f"{key}.B{i}", [b])
            adapters.append((None if halves else index, a, b, scale))
    return _Gemm(weight, bias, [len(each.weight) for each in members.values()], adapters, exact)


def copied_bytes(layers: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of the copies that a decode step makes on CUDA of the linear weights of a decoder's layers."""
    linear = ((name, each) for name, each in layers.named_parameters() if each.dim() == 2)
    small = ("k_proj", "v_proj")
    return sum(
        each.numel() * dtype.itemsize
        for name, each in linear
        if each.dtype != dtype or (any(part in name for part in small) and "lora_" not in name)
    )
