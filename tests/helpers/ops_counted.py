"""Counts of what a GPU would launch, on any device: nothing needs to be computed for them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = ("_unsafe_view", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "detach", "alias")
LAUNCHES = {"shared_prefix_decode": 2}  # of a custom op of ours on fake tensors; others have one


class OpsCounted(TorchDispatchMode):
    """Launches by name within the block. Views and new memory are free. An operator of torch is one launch, a Triton
    kernel too (with `kernels_counted`). A custom op of ours is what it launches, on fake tensors what `LAUNCHES` says.

    `casts` has the shape of each tensor that changed its dtype, `bytes` what each name read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.casts: list[tuple[int, ...]] = []

    @property
    def total(self) -> int:
        return self.launches.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = self.total
        out = func(*args, **(kwargs or {}))
        if self.total > before:
            return out  # a custom op, whose kernels were counted
        name = func._schema.name.split("::")[1]
        views = [each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns]
        if name in FREE or (views and all(views)):
            return out
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
        ours = [count for op, count in LAUNCHES.items() if func.namespace == "vlmr1_kernels" and name.startswith(op)]
        self.count(name, tensors, *ours)
        if name == "_to_copy" and tensors[0].dtype != tensors[-1].dtype:
            self.casts.append(tuple(out.shape))
        return out

    def count(self, name: str, tensors: Sequence[Tensor], launches: int = 1) -> None:
        self.launches[name] += launches
        self.bytes[name] += sum(each.numel() * each.element_size() for each in tensors)


@contextmanager
def kernels_counted(counted: OpsCounted) -> Iterator[None]:
    """Count Triton kernels, of whoever launches them, and run none: their outputs stay uninitialized."""
    from triton.runtime.jit import KernelInterface

    def getitem(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            counted.count(kernel.__name__, [each for each in tree_leaves(args) if isinstance(each, Tensor)])

        return launch

    with patch.object(KernelInterface, "__getitem__", getitem):
        yield
