from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.attention import CASES, FEW_KEYS, Heads, assert_equals, check_budget, separately, tensors
from tests.helpers.kernel_cases import Target, targets
from vlmr1_kernels import PrefixLayout, implementations, registry, shared_prefix_attention
from vlmr1_kernels.cpu import shared_prefix_attention as cpu
from vlmr1_kernels.reference import shared_prefix_attention as reference

OP = "shared_prefix_attention"
# flex is compiled anew for each number of heads: test_flex_attention.py has its cases.
TARGETS = [
    *(each for each in targets(OP, only=("reference", "cpu")) if each.values[0].device == "cpu"),
    *(each for each in targets(OP, only=("flash",)) if each.values[0].device == "cuda"),
]


@pytest.mark.parametrize(("layout", "heads"), (CASES | FEW_KEYS).values(), ids=(CASES | FEW_KEYS).keys())
@pytest.mark.parametrize("function", [reference, cpu], ids=["reference", "cpu"])
def test_equals_separate_sequences(function: Any, layout: PrefixLayout, heads: Heads) -> None:
    """The arithmetic, in float64, which the kernels below `cpu` serve too."""
    ours = partial(function.shared_prefix_attention, layout=layout, scale=0.3)
    assert_equals(ours, partial(separately, layout=layout, scale=0.3), tensors(layout.total_length, *heads))


OPTIONS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 0.7},
    "window of one row": {"window": 1},
    "window": {"window": 5},
    "window longer than all": {"window": 1000},
    "softcap and window": {"softcap": 1.5, "window": 9},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("case", ["ragged branches", "groups without branches", "many groups", "longer than a block"])
def test_softcap_and_window(case: str, options: dict[str, Any]) -> None:
    layout, heads = CASES[case]
    options = {"layout": layout, "scale": 2.3, **options}
    ours = partial(shared_prefix_attention, impl="reference", **options)
    assert_equals(ours, partial(separately, **options), tensors(layout.total_length, *heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("layout", "heads"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.slow
def test_error_is_within_budget(target: Target, layout: PrefixLayout, heads: Heads, dtype: torch.dtype) -> None:
    if target.impl == "flash" and heads[2] % 8:
        pytest.skip("flash serves head dimensions that are multiples of 8")
    ours = partial(target.run(dtype), layout=layout)
    oracle = partial(separately, layout=layout, scale=heads[2] ** -0.5)
    check_budget(ours, oracle, (layout.total_length, *heads), dtype, target.device)


@pytest.mark.parametrize("function", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize(
    "layout", [PrefixLayout((2, 1), ((2, 1), (1, 0))), PrefixLayout((2,), ((2, 2),))], ids=["ragged", "equal"]
)
def test_gradcheck(function: Any, layout: PrefixLayout) -> None:
    leaves = [value.contiguous().requires_grad_() for value in tensors(layout.total_length, 2, 1, 3)[:3]]
    assert torch.autograd.gradcheck(lambda *qkv: function.shared_prefix_attention(*qkv, layout, scale=0.7), leaves)


@pytest.mark.parametrize("function", [reference, cpu], ids=["reference", "cpu"])
def test_strides_of_the_inputs_do_not_matter(function: Any) -> None:
    attention = partial(function.shared_prefix_attention, layout=PrefixLayout((4, 2), ((3, 2), (2, 2))), scale=0.3)

    def reversed_strides(*qkv: Tensor) -> Tensor:
        return attention(*(value.mT.contiguous().mT for value in qkv))

    assert_equals(reversed_strides, attention, tensors(15, 4, 2, 8))


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "options", "chosen"),
    [
        ("cuda", torch.bfloat16, 128, (), "flash"),
        ("cuda", torch.float16, 80, (), "flash"),
        ("cuda", torch.bfloat16, 128, ("softcap",), "flex"),
        ("cuda", torch.bfloat16, 128, ("window",), "flex"),
        ("cuda", torch.bfloat16, 68, (), "flex"),
        ("cuda", torch.float32, 128, (), "flex"),
        ("cuda", torch.float32, 8, (), "reference"),
        ("cuda", torch.float64, 128, (), "reference"),
        ("cpu", torch.bfloat16, 128, (), "cpu"),
        ("cpu", torch.float32, 16, (), "cpu"),
        ("cpu", torch.float64, 16, (), "reference"),
        ("cpu", torch.float32, 128, ("window",), "reference"),
    ],
    ids=str,
)
def test_auto(device, dtype, head_dim, options, chosen, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(implementations, "_capability", lambda device: (9, 0))
    request = registry.Request(torch.device(device), dtype, (4, 2, 9, head_dim), frozenset(options))
    assert registry.explain(OP, request).chosen == chosen
    monkeypatch.setattr(implementations, "_capability", lambda device: (7, 5))
    if chosen == "flash":
        assert registry.explain(OP, request).others["flash"] == "needs compute capability 8.0"


@pytest.mark.parametrize(
    ("capability", "head_dim", "chosen"),
    [
        ((8, 0), 128, "flash"),
        ((9, 0), 128, "flash3"),
        ((9, 0), 256, "flash3"),
        ((10, 3), 128, "flash4"),
        ((10, 0), 256, "flash"),
        ((12, 0), 128, "flash"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", [OP, "varlen_attention"])
def test_auto_prefers_the_package_of_the_device(op, capability, head_dim, chosen, monkeypatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(implementations, "_capability", lambda device: capability)
    request = registry.Request(torch.device("cuda"), torch.bfloat16, (4, 2, 9, head_dim))
    monkeypatch.setattr(implementations, "_missing", lambda version: "not installed")
    assert registry.explain(op, request).chosen == "flash"
    monkeypatch.setattr(implementations, "_missing", lambda version: None)
    assert registry.explain(op, request).chosen == chosen
