"""Triton's interpreter, for machines without a GPU, and fast enough for tests."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

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
