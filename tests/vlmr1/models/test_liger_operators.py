"""Liger's operators in Triton's interpreter: their error beside the definitions, and the planner's stand-ins."""

import sys
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.families import checkpoints, one_family
from tests.helpers.fused import DEFINITIONS, counted, run
from tests.helpers.interpreter import AVAILABLE, interpreted_liger
from tests.vlmr1.models.test_fused_layers import expected_calls, flat
from vlmr1.grpo.packing import make_pack
from vlmr1.models import family_of
from vlmr1.models.fused_layers import Operators, liger_operators
from vlmr1.planner.fused_ops import STAND_INS
from vlmr1_kernels.testing import assert_within_budget

checkpoint = checkpoints()


@pytest.fixture(scope="module")
def liger() -> Iterator[Operators]:
    if not AVAILABLE:
        pytest.skip("needs Triton's interpreter")
    with interpreted_liger():
        yield liger_operators.__wrapped__()


def rotated(operators: Operators) -> Any:
    """Rotate copies: Liger's kernel overwrites its inputs, which are leaves here."""
    return lambda q, k: operators.rope(*(each.clone().transpose(1, 2) for each in (q, k)), *ANGLES)


ANGLES = [part(torch.linspace(0, 3, 5 * 8).view(1, 5, 8)).repeat(1, 1, 2) for part in (torch.cos, torch.sin)]
OPERATORS: dict[str, tuple[Any, list[tuple[int, ...]]]] = {  # function of the operators; shapes of its inputs
    "rms_norm": (lambda o: lambda x, w: o.rms_norm(x, w, 1e-3, False), [(2, 5, 24), (24,)]),
    "rms_norm in place": (lambda o: lambda x, w: o.rms_norm(x, w, 1e-3, True), [(2, 5, 24), (24,)]),
    "add_rms_norm": (lambda o: lambda r, x, w: o.add_rms_norm(r, x, w, 1e-3), [(2, 5, 24), (2, 5, 24), (24,)]),
    "layer_norm": (lambda o: lambda x, w, b: o.layer_norm(x, w, b, 1e-3), [(2, 5, 24), (24,), (24,)]),
    "swiglu": (lambda o: lambda gate, up: o.swiglu(gate.clone(), up.clone()), [(2, 5, 24), (2, 5, 24)]),
    "swiglu_packed": (lambda o: o.swiglu_packed, [(2, 5, 48)]),
    "rope": (rotated, [(1, 5, 4, 16), (1, 5, 2, 16)]),
}


def with_gradients(function: Any, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and the gradients of a random projection of them."""
    leaves = [value.to(dtype).requires_grad_() for value in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(each.shape, generator=generator, dtype=torch.float64).half().to(dtype) for each in out]
    return [each.detach() for each in out] + list(torch.autograd.grad(out, leaves, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_error_of_an_operator_is_within_budget(name, dtype, liger):
    """The interpreter multiplies bfloat16 numbers as integers; float16 takes the same path of the kernels."""
    assert_operator_within_budget(name, dtype, liger, OPERATORS[name][1])


def assert_operator_within_budget(name: str, dtype: torch.dtype, liger: Operators, shapes: Any) -> None:
    make, _ = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).half().double() for shape in shapes]
    ours, plain = (with_gradients(make(operators), inputs, dtype) for operators in (liger, DEFINITIONS))
    exact = with_gradients(make(DEFINITIONS), inputs, torch.float64)
    assert [value.dtype for value in ours] == [value.dtype for value in plain]
    assert_within_budget([f"{name}: result {i}" for i in range(len(ours))], ours, plain, exact)


def test_the_norm_of_many_narrow_rows_is_within_budget(liger, monkeypatch):
    """From 32,768 rows of at most 256 columns on Liger has kernels of 16 rows a block, as for the heads of queries and
    keys; here from the first row on. The last block is not full."""
    module: Any = sys.modules["liger_kernel.ops.rms_norm"]
    for name in ("forward", "backward"):
        code = getattr(module, f"rms_norm_{name}").__code__
        fewest = tuple(1 if constant == 32_768 else constant for constant in code.co_consts)
        assert fewest != code.co_consts
        monkeypatch.setattr(getattr(module, f"rms_norm_{name}"), "__code__", code.replace(co_consts=fewest))
        monkeypatch.setattr(module, f"_rms_norm_{name}_kernel", None)  # that of one row
    assert_operator_within_budget("rms_norm", torch.float32, liger, [(5, 9, 24), (24,)])


@pytest.mark.slow
@one_family()
def test_a_pass_with_liger_is_within_budget(model, make, liger):
    """In float16, for the interpreter. The other families call the same operators."""
    pack, family = make_pack(make.groups(("What is 7?", (56,), (5, 4)))), family_of(model)
    family.operators = DEFINITIONS
    exact = flat(run(deepcopy(model).double(), family, pack))
    stock = flat(run(model, family, pack, torch.float16))
    family.operators, calls = counted(liger)
    ours = flat(run(model, family, pack, torch.float16))
    assert calls == expected_calls(model)
    assert_within_budget([*exact], *([each[name] for name in exact] for each in (ours, stock, exact)))


# Stand-ins of the planner


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_stand_ins_keep_what_liger_keeps(name, dtype, liger):
    make, shapes = OPERATORS[name]

    def kept(operators: Operators) -> tuple[list[Any], list[Any]]:
        saved: list[Any] = []
        inputs = [torch.ones(shape) for shape in shapes]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.numel(), t.dtype)) or t, lambda t: t):
            out = with_gradients(make(operators), inputs, dtype)
        return sorted(saved, key=str), [(value.shape, value.dtype) for value in out]

    with FakeTensorMode(allow_non_fake_inputs=True):
        stand_ins = kept(STAND_INS)
    assert stand_ins == kept(liger)
