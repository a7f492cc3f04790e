"""Aten ops, the bytes that they move, and the bytes alive, counted on tensors without data."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GEMMS = ("mm", "addmm", "addmm_", "bmm")
ALLOCATING = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
OVERWRITING = ("copy_", "fill_", "zero_")


@dataclass(frozen=True)
class Op:
    """One call of an aten op: elements and dtype of each tensor that it reads or writes; one that it does both with
    counts twice."""

    name: str
    moved: list[tuple[int, torch.dtype]]

    def bytes_of(self, numel: int, dtypes: tuple[torch.dtype, ...]) -> int:
        """Bytes of tensors with so many elements and one of the dtypes."""
        return sum(size * dtype.itemsize for size, dtype in self.moved if size == numel and dtype in dtypes)


class Traffic(TorchDispatchMode):
    """Mode that counts: `ops`, without views and allocations, and `peak`, the most bytes allocated at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {leaf.untyped_storage()._cdata for leaf in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        name, schema = func._schema.name.split("::")[1], func._schema
        for leaf in _tensors(out):
            storage = leaf.untyped_storage()
            if storage._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        is_view = any(each.alias_info and not each.alias_info.is_write for each in schema.returns)
        if not is_view and name not in ALLOCATING:
            bound = zip((one.name for one in schema.arguments), args, strict=False)
            skipped = ("out", "self") if name in OVERWRITING or kwargs.get("beta", 1) == 0 else ("out",)
            read = [leaf for key, value in (*bound, *kwargs.items()) if key not in skipped for leaf in _tensors(value)]
            made = _tensors(out if schema.returns else args[0])  # operators on lists in place return nothing
            self.ops.append(Op(name, [(leaf.numel(), leaf.dtype) for leaf in (*read, *made)]))
        return out

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size

    def gemm_bytes(self, numel: int, *dtypes: torch.dtype) -> int:
        """Bytes of tensors with so many elements in matrix products."""
        return sum(op.bytes_of(numel, dtypes) for op in self.ops if op.name in GEMMS)

    def other_bytes(self, numel: int, *dtypes: torch.dtype) -> int:
        """Bytes of tensors with so many elements in all other ops."""
        return sum(op.bytes_of(numel, dtypes) for op in self.ops if op.name not in GEMMS)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
