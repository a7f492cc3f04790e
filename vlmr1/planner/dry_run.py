"""Dry runs: model code on tensors with shapes and no data, whose bytes are counted by cause.

The code that trains is the code that is counted, autograd included. Floating-point tensors are torch's fake tensors;
integers and booleans stay real, because models look at token ids, grids and offsets. What an operator allocates within
itself is not seen; where it matters, `transient` adds it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmr1.models.quantization import scales_of
from vlmr1_kernels.custom_ops import COMPOSED

# Causes of an allocation.
WEIGHTS, GRADIENTS, ACTIVATIONS, VISION = "weights", "gradients", "activations", "vision tower"
LOGITS, KV, GRAPHS = "logits", "kv cache", "cuda graphs"
DECODE_WEIGHTS = "decode weights"  # copies in the compute dtype
HELD = "held"  # tensors from before the run
HOST = "host"  # in host memory, which counts for no device
_DEVICE = torch.ops.prim.device.default
_VALUE = torch.ops.aten._local_scalar_dense.default
_FROM_NUMBERS = torch.ops.aten.lift_fresh.default  # torch.tensor of Python numbers: small, and made on the host
_RUNNING: list[DryRun] = []
_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class DryRun(TorchDispatchMode):
    """A mode in which nothing is computed. `peak` is the largest number of bytes alive at a time, `at_peak` the same by
    cause.

    Tensors from before the run and tensors of an uncounted cause are left out."""

    def __init__(self, cause: str, uncounted: Iterable[str] = ()):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.cause = cause
        self.uncounted = {HOST, *uncounted}
        self.live: Counter[str] = Counter()
        self.total = self.peak = self.most_on_host = 0
        self.at_peak: Mapping[str, int] = {}
        self._known: dict[int, list[Any]] = {}  # storages alive: [cause, bytes]

    def __enter__(self) -> Any:
        _RUNNING.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _RUNNING.remove(self)
        super().__exit__(*exception)

    def add_kernel(self, name: str, flops: float, moved: float) -> None:
        """Note a kernel that a stand-in stands for; see `kernel`."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _VALUE and isinstance(args[0], FakeTensor) and args[0].dtype == torch.bool:
            return True  # checks of values, as that all are finite, hold
        if func is _DEVICE:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        if func in COMPOSED:
            with self:
                return COMPOSED[func](*args)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(tensor, FakeTensor) for tensor in given):
            if func in _INDEXED:
                args = (args[0], _positions(args[1]), *args[2:])
            with self.fake:
                out = func(*args, **kwargs)
        elif given:
            out = func(*args, **kwargs)
        else:
            with self.fake:
                out = func(*args, **kwargs)
            if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(out)):
                out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for leaf in made:
            self._count(leaf, 0 if func is _FROM_NUMBERS else None)
        return out

    def _count(self, tensor: Tensor, size: int | None = None) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes() if size is None else size
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = [self.cause, size]
        weakref.finalize(storage, self._gone, key)
        self._add(self.cause, size)

    def _gone(self, key: int) -> None:
        cause, size = self._known.pop(key)
        self._add(cause, -size)

    def _add(self, cause: str, size: int) -> None:
        self.live[cause] += size
        if cause in self.uncounted:
            self.most_on_host = max(self.most_on_host, self.live[HOST])
            return
        self.total += size
        if self.total > self.peak:
            self._peak()

    def _peak(self) -> None:
        self.peak = self.total
        self.at_peak = {cause: held for cause, held in self.live.items() if cause not in self.uncounted}

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Leave out these tensors and views of them: they were there before the run."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()._cdata] = [HELD, 0]

    @contextmanager
    def of(self, cause: str) -> Iterator[None]:
        """Count what is allocated in this block under this cause."""
        before, self.cause = self.cause, cause
        try:
            yield
        finally:
            self.cause = before

    def transient(self, cause: str, size: int) -> None:
        """Count bytes that an operator holds while it runs."""
        self._add(cause, size)
        self._add(cause, -size)

    def is_of(self, tensor: Tensor, cause: str) -> None:
        """Count this tensor under another cause from now on."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is not None and known[0] != cause:
            self._add(known[0], -known[1])
            self._add(cause, known[1])
            known[0] = cause

    def cause_of(self, tensor: Tensor) -> str | None:
        """The cause that a tensor is counted under; None where it is not counted."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[0]

    def restart(self) -> None:
        """Forget the peak so far."""
        self._peak()


def kernel(name: str, flops: float, *moved: Tensor | float) -> None:
    """Tell the dry runs in progress of a kernel that a stand-in allocates for but does not call. `moved`: tensors that
    it reads or writes, or numbers of bytes."""
    size = sum(each.nbytes if isinstance(each, Tensor) else each for each in moved)
    for run in dict.fromkeys(_RUNNING):  # a run may be entered again within itself
        run.add_kernel(name, flops, size)


def _positions(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Replace boolean masks by the positions where they are true: masks are real tensors, so these are known."""
    out: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            out += index.nonzero().unbind(1)
        else:
            out.append(index)
    return out


def without_data(make: Callable[[], Any], mode: FakeTensorMode) -> Any:
    """Return the module that `make` builds on the meta device, with fake CPU tensors in place of its own."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = make()
    packed = {name: weight for name, weight in model.named_parameters() if scales_of(weight)}
    with mode:
        model.to_empty(device="cpu")
        for name, weight in packed.items():
            _pack(model.get_parameter(name), weight)
    return model


def _pack(fake: Any, weight: Any) -> None:
    """Give a fake weight the scales of a 4-bit weight, fake too, and its class name, by which peft recognizes it."""
    fake.__class__ = Params4bit
    fake.quant_state = copy(weight.quant_state)
    fake.quant_state.state2 = copy(weight.quant_state.state2)
    for path, scale in scales_of(weight).items():
        within, _, name = path.rpartition(".")
        state = getattr(fake.quant_state, within) if within else fake.quant_state
        setattr(state, name, torch.empty_like(scale, device="cpu"))


class Params4bit(FakeTensor):
    """A 4-bit weight without data, under the class name that bitsandbytes has for it."""
