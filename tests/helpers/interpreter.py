"""Triton's interpreter, for machines without a GPU, and fast enough for tests."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

VARIABLE = "TRITON_INTERPRET"
AVAILABLE = find_spec("triton") is not None and not torch.cuda.is_available()


def load_kernels() -> None:
    """Import the Triton implementations, interpreted; triton itself must not have been imported before.

    Triton reads the variable when it is imported, the registry at every call. It does not stay set: where the
    interpreter looks usable, `auto` may choose it, which only the tests of the kernels want.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(VARIABLE, "1")
        import_module("vlmr1_kernels.triton.linear_grpo_loss")
        import_module("vlmr1_kernels.triton.linear_logprob")
        import_module("vlmr1_kernels.triton.shared_prefix_decode")
        import_module("vlmr1_kernels.triton.sample_tokens")
        import_module("vlmr1_kernels.triton.rope_kv_write")
        import_module("vlmr1_kernels.flash.merge")
        _patch_once_a_launch()


def _patch_once_a_launch() -> None:
    """The interpreter prepares the whole language anew in each call of a device function: half of its time."""
    interpreter: Any = import_module("triton.runtime.interpreter")
    launch, prepared = interpreter.GridExecutor.__call__, set()

    def start(executor: Any, *args: Any, **options: Any) -> None:
        prepared.clear()
        launch(executor, *args, **options)

    def call(function: Any, *args: Any, **options: Any) -> Any:
        if function.fn not in prepared:
            interpreter._patch_lang(function.fn)
            prepared.add(function.fn)
        return function.rewrite()(*args, **options)

    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = start, call


@contextmanager
def interpreted_liger() -> Iterator[None]:
    """Import of Liger's kernels, interpreted, in this block; others see the modules that they have imported.

    Liger's kernels call `.to` of float arguments, which the interpreter leaves as Python's."""
    interpreter: Any = import_module("triton.runtime.interpreter")
    language = import_module("triton.language")
    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), language.float32)
        return language.tensor(handle, language.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "1")
        patch.setattr(interpreter, "_implicit_cvt", with_floats)
        for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
            patch.delitem(sys.modules, name)
        import_module("liger_kernel.ops")
        for name in ("rms_norm", "fused_add_rms_norm", "layer_norm"):  # CUDA's function is empty for the interpreter
            sys.modules[f"liger_kernel.ops.{name}"].rsqrt = lambda x: language.math.rsqrt(x)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.partition(".")[0] == "liger_kernel"]:
                del sys.modules[name]
