"""Kernels of a dry run: the FLOPs of each, the bytes that it moves, and how often it is launched.

An operator that is neither a view nor an allocation counts as one kernel. Its bytes are those of all tensors that it
reads and writes, once each; of a lookup or an update of single rows, those of the rows. The stand-ins of CUDA ops
(`cuda_ops.py`) call no operators, and tell of their kernels. FLOPs are those of `torch.utils.flop_counter`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from vlmr1.planner.dry_run import ACTIVATIONS, DryRun
from vlmr1_kernels.custom_ops import COMPOSED

PRODUCTS = frozenset(("mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "convolution_backward"))
ALLOCATING = frozenset(("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh"))
OVERWRITING = frozenset(("copy_", "fill_", "zero_"))  # their first tensor is not read
# Operators that read rows of a tensor: what they return is what they read. The others write rows of one.
LOOKUPS = frozenset(("embedding", "index_select", "gather", "index"))
ROW_UPDATES = frozenset(("index_copy_", "index_put_", "index_put", "scatter_", "index_add_"))
UNCOUNTED = ""  # phase of what is there before a pass


@dataclass(frozen=True)
class Kernel:
    """One kernel; equal ones are counted."""

    name: str
    flops: float
    bytes: float
    half: bool = True  # whether operands are of half precision
    numels: tuple[int, ...] = ()  # of the tensors of an operator

    @property
    def kind(self) -> str:
        if "attention" in self.name:
            return "attention"
        return "product" if self.name in PRODUCTS else "other"


Kernels = Counter[Kernel]


def totals(kernels: Kernels) -> dict[str, float]:
    """FLOPs, bytes and number of kernels."""
    flops, moved = (sum(n * getattr(each, of) for each, n in kernels.items()) for of in ("flops", "bytes"))
    return {"flops": flops, "bytes": moved, "kernels": sum(kernels.values())}


class WorkRun(DryRun):
    """A dry run that counts kernels by phase. Operators without a floating-point
    tensor are left out: most of them run on the host. `of_tensors`: count a run on real tensors."""

    def __init__(self, phase: str = UNCOUNTED, *, of_tensors: bool = False):
        super().__init__(ACTIVATIONS)
        self.phase, self.of_tensors = phase, of_tensors
        self.repeats = 1  # times that what runs is counted
        self.kernels: defaultdict[tuple[str, str], Kernels] = defaultdict(Counter)  # by phase and cause

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count what runs in this block as of another phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def add_kernel(self, name: str, flops: float, moved: float) -> None:
        self._add_kernel(Kernel(name, flops, moved))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSED:
            with self:
                return COMPOSED[func](*args)
        out = func(*args, **kwargs) if self.of_tensors else super().__torch_dispatch__(func, types, args, kwargs)
        if any(self._counts(each) for each in tree_leaves((args, kwargs, out))):
            kernel = kernel_of(func, args, kwargs, out)
            if kernel is not None:
                self._add_kernel(kernel)
        return out

    def _counts(self, value: Any) -> bool:
        if self.of_tensors:
            return isinstance(value, Tensor) and value.is_floating_point()
        return isinstance(value, FakeTensor)

    def _add_kernel(self, kernel: Kernel) -> None:
        self.kernels[self.phase, self.cause][kernel] += self.repeats


def kernel_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Kernel | None:
    """The kernel of an operator; None for views, allocations, and operators without tensors."""
    schema = func._schema
    name = schema.name.split("::")[1]
    is_view = any(each.alias_info and not each.alias_info.is_write for each in schema.returns)
    written = _tensors(out) or [
        tensor
        for argument, value in zip(schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(value)
    ]
    if is_view or name in ALLOCATING or not written or name == "_unsafe_view":
        return None
    read = _tensors((args, kwargs))
    if name in OVERWRITING:
        read = read[1:]
    if name in LOOKUPS:
        moved = 2 * sum(map(_bytes, written))
    elif name in ROW_UPDATES:
        moved = 2 * sum(map(_bytes, read[1:]))
    else:
        moved = sum(map(_bytes, (*read, *written)))
    half = any(each.itemsize == 2 for each in read if each.is_floating_point())  # log-sum-exps are float32
    numels = tuple(each.numel() for each in (*read, *written))
    return Kernel(name, _flops(func, args, kwargs, out), moved, half, numels)


def _flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
    packet = func._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        q, k, v = (each.shape for each in args[:3])
        causal = len(args) > 4 and args[4]
        return sdpa_flop_count(q, k, v) / (2 if causal else 1)
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        _, q, k, v = (each.shape for each in args[:4])
        causal = len(args) > 7 and args[7]
        return 2.5 * sdpa_flop_count(q, k, v) / (2 if causal else 1)
    return 0


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension has one."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.itemsize * math.prod(size if step else min(size, 1) for size, step in sizes)
