"""The flash implementations: their arithmetic against kernels written out in plain torch, their calls against
torch's schemas without a GPU, and the real kernels where there is one."""

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import vlmr1_kernels
from tests.helpers import flash_kernels
from tests.helpers.attention import (
    CASES,
    FEW_KEYS,
    SEQUENCES,
    Heads,
    assert_equals,
    offsets,
    one_by_one,
    separately,
    tensors,
)
from tests.helpers.kernel_cases import no_waiting, on_gpu
from vlmr1_kernels import PrefixLayout
from vlmr1_kernels.flash import kernels, sequences, shared_prefix_attention, varlen_attention


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """The kernels in plain torch; the calls that reach them."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def spy(name: str, *arguments: Any) -> Any:
        calls.append((name, arguments))
        return getattr(flash_kernels, name)(*arguments)

    for name in ("varlen_forward", "varlen_backward"):
        monkeypatch.setattr(kernels, name, partial(spy, name))
    return calls


SERVED = {name: case for name, case in CASES.items() if case[1][2] % 8 == 0}


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("layout", "heads"), (SERVED | FEW_KEYS).values(), ids=(SERVED | FEW_KEYS).keys())
def test_equals_separate_sequences(layout: PrefixLayout, heads: Heads) -> None:
    ours = partial(shared_prefix_attention.shared_prefix_attention, layout=layout, scale=0.3)
    assert_equals(ours, partial(separately, layout=layout, scale=0.3), tensors(layout.total_length, *heads))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_varlen_equals_one_by_one(lengths: tuple[int, ...]) -> None:
    lengths = tuple(filter(None, lengths))
    options: dict[str, Any] = {"cu_seqlens": offsets(lengths), "max_length": max(lengths), "scale": 0.3}
    oracle = partial(one_by_one, lengths=lengths, scale=0.3)
    assert_equals(partial(varlen_attention.varlen_attention, **options), oracle, tensors(sum(lengths), 4, 2, 16))


def test_inputs_are_views_and_the_output_has_rows_outermost(plain: list[Any]) -> None:
    layout = PrefixLayout((5, 3), ((2, 2), (3,)))
    for inputs in (
        tensors(15, 4, 2, 16),
        [value.contiguous() for value in tensors(15, 4, 2, 16)],  # heads outermost
    ):
        plain.clear()
        q, k, v, d_out = inputs
        for leaf in (q, k, v):
            leaf.requires_grad_()
        out = shared_prefix_attention.shared_prefix_attention(q, k, v, layout, scale=1.0)
        assert out.transpose(1, 2).is_contiguous()
        torch.autograd.grad(out, (q, k, v), d_out)
        given = [arguments[0] if name == "varlen_forward" else arguments[1] for name, arguments in plain]
        base = given[0].data_ptr()
        size = 4 * 16 * q.element_size()
        assert [each.data_ptr() - base for each in given] == [0, 8 * size, 0, 8 * size]
        assert base == q.data_ptr() or q.is_contiguous()
        places = [arguments[1] for name, arguments in plain if name == "varlen_forward"]
        assert {each.data_ptr() for each in places} == {k.data_ptr()}


@pytest.mark.usefixtures("plain")
def test_what_the_kernels_cannot_load_is_copied() -> None:
    layout = PrefixLayout((5, 3), ((2, 2), (3,)))
    inputs = tensors(15, 2, 1, 16)
    shifted = [
        torch.zeros(value.numel() + 3, dtype=value.dtype)[3:].view(1, -1, *value.shape[1::2]) for value in inputs
    ]
    for there, value in zip(shifted, inputs, strict=True):
        there.copy_(value.transpose(1, 2))
    attention = partial(shared_prefix_attention.shared_prefix_attention, layout=layout, scale=1.0)
    leaves = [each.transpose(1, 2).requires_grad_() for each in shifted[:3]]
    out = attention(*leaves)  # _check of the kernels asserts the alignment
    torch.testing.assert_close(out, attention(*inputs[:3]))


@pytest.mark.usefixtures("plain")
def test_checkpointing_and_no_grad() -> None:
    layout, heads = CASES["ragged branches"]
    inputs = tensors(layout.total_length, *heads)
    attention = partial(shared_prefix_attention.shared_prefix_attention, layout=layout, scale=1.0)
    assert_equals(partial(checkpoint, attention, use_reentrant=False), attention, inputs, rtol=0, atol=0)
    with torch.no_grad():
        expected = attention(*inputs[:3])
        assert torch.equal(attention(*(each.requires_grad_() for each in inputs[:3])), expected)


LAYOUTS = {name: CASES[name][0] for name in ("many groups", "groups without branches", "prefill")}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_torch_accepts_the_calls(layout: PrefixLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas and shapes of torch's own kernels, forward and backward, on tensors without memory."""
    shapes: list[tuple[int, ...]] = []
    forward = kernels.varlen_forward

    def spy(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward(q, *others)
        assert lse.dtype == torch.float32
        shapes.extend((tuple(q.shape), tuple(lse.shape)))
        return out, lse

    monkeypatch.setattr(kernels, "varlen_forward", spy)
    rows, first = layout.total_length, layout.prompt_total
    q, k, v = leaves = [
        torch.empty(1, rows, heads, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2).requires_grad_()
        for heads in (8, 2, 2)
    ]
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    for out in (
        shared_prefix_attention.shared_prefix_attention(q, k, v, layout, scale=0.3),
        varlen_attention.varlen_attention(q, k, v, cu_seqlens, rows, scale=0.3),
    ):
        assert (out.shape, out.dtype) == (leaves[0].shape, torch.bfloat16)
        gradients = torch.autograd.grad(out, leaves, torch.empty_like(out))
        assert [(each.shape, each.dtype) for each in gradients] == [(leaf.shape, leaf.dtype) for leaf in leaves]
    own, more = [(rows, 8, 64), (8, rows)], [(rows - first, 8, 64), (8, rows - first)]
    assert shapes == own + (more if rows > first else []) + own


def package() -> ModuleType:
    """flash_attn.flash_attn_interface of version 2.8: its signatures over the plain kernels."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0
        numbers = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
        return *flash_kernels.varlen_forward(q, k, v, *numbers), q.new_empty(0), q.new_empty(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0, -1, -1, 0)
        numbers = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
        results = flash_kernels.varlen_backward(dout, q, k, v, out, softmax_lse, *numbers)
        for there, value in zip((dq, dk, dv), results, strict=True):
            there.copy_(value)
        return q.new_empty(0)

    module.__dict__.update(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward, _flash_attn_varlen_backward=_flash_attn_varlen_backward
    )
    return module


def test_the_package_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ModuleType("flash_attn"), package()):
        module.__spec__ = ModuleSpec(module.__name__, None)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(kernels.metadata, "version", {"flash-attn": "2.8.3"}.__getitem__)
    kernels._has_package.cache_clear()
    try:
        test_equals_separate_sequences(*CASES["groups without branches"])
    finally:
        kernels._has_package.cache_clear()


INTERFACE = "flash_attn/flash_attn_interface.py"
INSTALLED = {  # version and files of a package, whether it is used
    "2.7.0": ("2.7.0", INTERFACE, True),
    "2.10": ("2.10.1.post1", INTERFACE, True),
    "before 2.7": ("2.6.3", INTERFACE, False),
    "version 3 under this name": ("3.0.0b1", "flash_attn_interface.py", False),
    "version 4 beside the metadata of 2": ("2.8.3", "flash_attn/cute.py", False),
    "version 3 with the module": ("3.0.0b1", INTERFACE, False),
}


@pytest.mark.parametrize(("version", "file", "used"), INSTALLED.values(), ids=INSTALLED.keys())
def test_only_packages_with_the_interface_of_version_2_are_used(
    version: str, file: str, used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(kernels.metadata, "version", lambda name: version)
    with patch.dict(sys.modules):
        for name in ("flash_attn", "flash_attn.flash_attn_interface"):
            sys.modules.pop(name, None)
        assert kernels._has_package.__wrapped__() is used


@on_gpu
def test_nothing_waits_for_the_device() -> None:
    layout, heads = CASES["many groups"]
    attention = partial(vlmr1_kernels.shared_prefix_attention, layout=layout, impl="flash")
    q, k, v, d_out = (value.to("cuda", torch.bfloat16) for value in tensors(layout.total_length, *heads))
    leaves = [each.requires_grad_() for each in (q, k, v)]
    sequences.plan.cache_clear()
    with no_waiting():
        torch.autograd.grad(attention(*leaves), leaves, d_out)
