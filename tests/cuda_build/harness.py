"""Triton's launcher on a stub of the driver, and CUDA tensors without data: what a GPU would be asked to do."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

from tests.helpers.resources import SHARED_MEMORY
from tests.helpers.traffic import Traffic
from vlmr1_kernels.flash import sequences
from vlmr1_kernels.triton import launch

CAPABILITIES = (80, 86, 90, 100, 120)
GRID, THREADS = (2**31 - 1, 65_535, 65_535), 1024  # most programs in each dimension of a grid, most threads of one
# Ops whose result the host reads, or whose shape depends on values.
WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "equal"}
WAITING |= {"unique_consecutive", "bincount", "repeat_interleave"}
INDEXING, COPYING = {"index", "index_put", "index_put_", "_index_put_impl_"}, {"to", "_to_copy", "copy_", "_copy_from"}
FREE = {"_unsafe_view", "lift_fresh", "device"}  # beside views and allocations: no kernel


class Launch(ctypes.Structure):
    """A launch as the driver sees it."""

    _fields_ = (("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint))


class Stub:
    """The compiled stub, loaded as libcuda.so.1 of this process, and Triton's launcher on it."""

    def __init__(self) -> None:
        path = Path(mkdtemp()) / "libcuda.so.1"
        source = Path(__file__).with_name("stub.c")
        subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", path, source], check=True)
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        self.count = ctypes.c_uint.in_dll(library, "launch_count")
        self.launches = (Launch * 2**16).in_dll(library, "launches")
        flags = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)  # the stub lacks what no launch calls
        try:
            with patch.object(nvidia, "libcuda_dirs", lambda: [str(path.parent)]):
                self.utils = nvidia.CudaUtils()
        finally:
            sys.setdlopenflags(flags)


stub = cache(Stub)


class Driver(nvidia.CudaDriver):
    """Triton's driver for a device of a compute capability that is not there."""

    def __init__(self, capability: int):
        self.utils, self.launcher_cls = stub().utils, nvidia.CudaLauncher
        properties = {"max_shared_mem": SHARED_MEMORY[capability], "multiprocessor_count": 132}
        self.utils.load_binary = lambda name, kernel, shared, device: (1, 1, 64, 0, THREADS)
        self.utils.get_device_properties = lambda device: properties
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: capability  # compiled kernels are cached by device
        self.get_current_stream = lambda device: 0


@contextmanager
def on_stub(capability: int = 90) -> Iterator[list[tuple[str, Launch]]]:
    """Launch Triton's kernels on the stub: name of each, and what the driver was asked for."""
    launches: list[tuple[str, Launch]] = []
    run, seen = JITFunction.run, stub()

    def recorded(kernel: Any, *args: Any, **options: Any) -> Any:
        before = seen.count.value
        compiled = run(kernel, *args, **options)
        assert seen.count.value == before + 1, f"{kernel.__name__} did not reach the driver"
        launches.append((kernel.__name__, Launch.from_buffer_copy(seen.launches[before])))
        if seen.count.value > 2**15:
            seen.count.value = 0
        return compiled

    for cached in (launch.architecture, launch.shared_memory, launch.processors):
        cached.cache_clear()
    with patch.object(triton.runtime.driver, "_active", Driver(capability)), patch.object(JITFunction, "run", recorded):
        yield launches


class OnCuda(Traffic):
    """Mode that counts ops on CUDA tensors, and refuses those that wait for the device or copy from or to it.

    Custom ops run their CUDA implementation; what is computed from tensors in host memory alone is computed."""

    def __init__(self, *, checked: bool = True, moves: bool = False) -> None:
        """`checked` False: everything is allowed, as before a step is captured; `moves`: copies to the device are
        that the host does not wait for."""
        super().__init__()
        self.checked, self.moves = checked, moves

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.split("::")[1], kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = {tensor.device.type for tensor in given}
        if "cuda" in places and func.namespace == "vlmr1_kernels":
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
        target = torch.device(kwargs.get("device") or "cpu").type
        if any(isinstance(tensor, FakeTensor) for tensor in given) or (target == "cuda" and name not in COPYING):
            out = super().__torch_dispatch__(func, types, args, kwargs)
        elif target == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        else:  # the mode of fake tensors would copy for real
            out = torch.empty_like(given[0], dtype=kwargs.get("dtype"), device=target)
        if self.checked:
            self._check(name, given, out, kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,)))
        return out

    def _check(self, name: str, given: list[torch.Tensor], out: Any, non_blocking: bool) -> None:
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        places = {tensor.device.type for tensor in (*given, *results)}
        if "cuda" not in places:
            return
        assert name not in WAITING, f"{name} waits for the device"
        masks = [tensor for tensor in given[1:] if tensor.dtype in (torch.bool, torch.uint8)]
        assert not (name in INDEXING and masks), f"{name} with a mask waits for the device"
        if name in INDEXING | COPYING and len(places) > 1:
            allowed = self.moves and non_blocking and results[0].device.type == "cuda"
            assert allowed, f"{name} copies between the host and the device"

    @property
    def kernels(self) -> list[str]:
        """Names of the ops that launch a kernel."""
        return [op.name for op in self.ops if op.name not in FREE]


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors on "cuda" have no data; nothing asks for a device that is not there."""
    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="stub", total_memory=2**37)
    changes = {
        "_exchange_device": lambda index: -1,
        "_maybe_exchange_device": lambda index: -1,
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
    }
    with ExitStack() as stack:
        for name, value in changes.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        sequences.plan.cache_clear()  # it may hold tensors of an earlier mode
        yield
