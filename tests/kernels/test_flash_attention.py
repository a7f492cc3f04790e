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
from tests.helpers import attention as cases
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
    with_gradients,
)
from tests.helpers.kernel_cases import DEVICES, no_waiting, on_gpu
from tests.helpers.limits import limit_of
from tests.helpers.traffic import Traffic
from vlmr1_kernels import PrefixLayout, custom_ops
from vlmr1_kernels.flash import packages, sequences
from vlmr1_kernels.flash.kernels import KERNELS, Kernels
from vlmr1_kernels.testing import assert_within_budget

pytest.importorskip("triton")
from vlmr1_kernels.flash import merge, shared_prefix_attention, varlen_attention

DEVICE = DEVICES[-1]


def tensors(*sizes: int) -> list[Tensor]:
    """The tensors of the cases where the merge can run."""
    return [value.to(DEVICE) for value in cases.tensors(*sizes)]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """The kernels in plain torch; the calls that reach them."""
    calls: list[tuple[str, tuple[Any, ...]]] = []

    def spy(kind: str, *arguments: Any) -> Any:
        calls.append((kind, arguments))
        return getattr(flash_kernels, f"varlen_{kind}")(*arguments)

    monkeypatch.setitem(KERNELS, "flash", Kernels(*(partial(spy, kind) for kind in Kernels._fields)))
    return calls


SERVED = {name: case for name, case in CASES.items() if case[1][2] % 8 == 0}


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(("layout", "heads"), (SERVED | FEW_KEYS).values(), ids=(SERVED | FEW_KEYS).keys())
def test_equals_separate_sequences(layout: PrefixLayout, heads: Heads) -> None:
    ours = partial(shared_prefix_attention.flash, layout=layout, scale=0.3)
    assert_equals(
        ours, partial(separately, layout=layout, scale=0.3), cases.tensors(layout.total_length, *heads), device=DEVICE
    )


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES.keys())
def test_varlen_equals_one_by_one(lengths: tuple[int, ...]) -> None:
    lengths = tuple(filter(None, lengths))
    cu_seqlens = offsets(lengths).to(DEVICE)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "max_length": max(lengths), "scale": 0.3}
    oracle = partial(one_by_one, lengths=lengths, scale=0.3)
    assert_equals(
        partial(varlen_attention.flash, **options), oracle, cases.tensors(sum(lengths), 4, 2, 16), device=DEVICE
    )


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
        out = shared_prefix_attention.flash(q, k, v, layout, scale=1.0)
        assert out.transpose(1, 2).is_contiguous()
        torch.autograd.grad(out, (q, k, v), d_out)
        given = [arguments[0] if name == "forward" else arguments[1] for name, arguments in plain]
        places, size = [each.data_ptr() for each in given], 4 * 16 * q.element_size()
        assert places[1::2] == [place + 8 * size for place in places[::2]]
        assert {*places[::2]} == {q.data_ptr()} or q.is_contiguous()
        places = [arguments[1] for name, arguments in plain if name == "forward"]
        assert {each.data_ptr() for each in places} == {k.data_ptr()}


@pytest.mark.usefixtures("plain")
def test_what_the_kernels_cannot_load_is_copied() -> None:
    layout = PrefixLayout((5, 3), ((2, 2), (3,)))
    inputs = tensors(15, 2, 1, 16)
    shifted = [
        torch.zeros(value.numel() + 3, dtype=value.dtype, device=DEVICE)[3:].view(1, -1, *value.shape[1::2])
        for value in inputs
    ]
    for there, value in zip(shifted, inputs, strict=True):
        there.copy_(value.transpose(1, 2))
    attention = partial(shared_prefix_attention.flash, layout=layout, scale=1.0)
    leaves = [each.transpose(1, 2).requires_grad_() for each in shifted[:3]]
    out = attention(*leaves)  # _check of the kernels asserts the alignment
    torch.testing.assert_close(out, attention(*inputs[:3]))


@pytest.mark.usefixtures("plain")
def test_checkpointing_and_no_grad() -> None:
    layout, heads = CASES["ragged branches"]
    inputs = tensors(layout.total_length, *heads)
    attention = partial(shared_prefix_attention.flash, layout=layout, scale=1.0)
    recomputed = partial(checkpoint, attention, use_reentrant=False)
    found, expected = (with_gradients(each, inputs, torch.float64, device=DEVICE) for each in (recomputed, attention))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch.no_grad():
        expected = attention(*inputs[:3])
        assert torch.equal(attention(*(each.requires_grad_() for each in inputs[:3])), expected)


LAYOUTS = {name: CASES[name][0] for name in ("many groups", "groups without branches", "prefill")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_error_of_the_merge_is_within_budget(dtype: torch.dtype) -> None:
    """Against float64; 40 rows are more than a block. Log-sum-exps are far apart, equal, and near."""
    length, rows, heads = 47, 40, 3
    out, more = torch.randn(length, heads, 24).to(dtype), torch.randn(rows, heads, 24).to(dtype)
    lse, more_lse = 9 * torch.randn(heads, length), torch.randn(heads, rows)
    more_lse[:, :5], more_lse[:, 5:9] = lse[:, 7:12], 80.0

    def plain(wide: torch.dtype) -> list[Tensor]:
        own, other = lse[:, 7:].to(wide), more_lse.to(wide)
        share = torch.sigmoid(other - own).T[..., None]
        merged = torch.lerp(out[7:].to(wide), more.to(wide), share)
        return [merged.to(dtype if wide == torch.float32 else wide), torch.logaddexp(own, other)]

    found = [each.to(DEVICE, copy=True) for each in (out, lse)]
    merge.merge_rows(*found, more.to(DEVICE), more_lse.to(DEVICE))
    merged, sums = (each.cpu() for each in found)
    assert torch.equal(merged[:7], out[:7]) and torch.equal(sums[:, :7], lse[:, :7])
    names = ["out", "lse"]
    assert_within_budget(names, [merged[7:], sums[:, 7:]], plain(torch.float32), plain(torch.float64))


def blank(rows: int, heads: int, rows_first: bool, dtype: torch.dtype = torch.bfloat16, width: int = 64) -> Tensor:
    """[1, H, rows, width] without memory, in one of two memory orders."""
    shape = (1, rows, heads, width) if rows_first else (1, heads, rows, width)
    made = torch.empty(shape, dtype=dtype, device="meta")
    return made.transpose(1, 2) if rows_first else made


@pytest.mark.parametrize("rows_first", [True, False], ids=["rows first", "heads first"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_torch_accepts_the_calls_and_fakes_tell_what_they_return(
    layout: PrefixLayout, rows_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schemas and shapes of torch's own kernels, forward and backward, on tensors without memory."""
    shapes: list[tuple[int, ...]] = []

    def spy(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        out, lse = kernels.forward(q, *others)
        shapes.extend((tuple(q.shape), tuple(lse.shape)))
        return out, lse

    kernels = KERNELS["flash"]
    monkeypatch.setitem(KERNELS, "flash", kernels._replace(forward=spy))
    monkeypatch.setattr(merge, "launch", lambda *args, **constants: None)
    rows, first = layout.total_length, layout.prompt_total
    qkv = [blank(rows, heads, rows_first) for heads in (8, 2, 2)]
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")

    def described(values: tuple[Tensor, ...]) -> list[Any]:
        return [(value.shape, value.stride()[1:], value.dtype, value.device.type) for value in values]

    ops = torch.ops.vlmr1_kernels
    for op, backward, where in (
        (ops.shared_prefix_attention_flash, ops.shared_prefix_attention_flash_backward, [layout.table]),
        (ops.varlen_attention_flash, ops.varlen_attention_flash_backward, [cu_seqlens, rows]),
    ):
        made = custom_ops.COMPOSED[op.default](*qkv, *where, 0.3)
        assert described(made) == described(op(*qkv, *where, 0.3))
        arguments = [torch.empty_like(made[0]), *qkv, *made, *where, 0.3]
        found = custom_ops.COMPOSED[backward.default](*arguments)
        assert described(found) == described(backward(*arguments))
        assert [each.shape for each in found] == [each.shape for each in qkv]
    own, more = [(rows, 8, 64), (8, rows)], [(rows - first, 8, 64), (8, rows - first)]
    assert shapes == own + (more if rows > first else []) + own


BESIDE = "launches beside the two kernels of a layer's attention"


def test_launches_and_bytes_of_a_layer_beside_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of 3B at a pack of 16,200 tokens. Merged by torch's operators it was 7 launches and 633 MB in forward, 7
    and 241 MB in backward."""
    launches: list[int] = []

    def count(kernel: Any, programs: int, out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, *_: Any, **__: Any):
        launches.append(3 * more.nbytes + 3 * more_lse.nbytes)  # two reads and a write of each

    monkeypatch.setattr(merge, "launch", count)
    layout = PrefixLayout((1200,) * 5, ((255,) * 8,) * 5)
    qkv = [blank(layout.total_length, heads, True, width=128) for heads in (16, 2, 2)]
    sequences.plan(layout, qkv[0].device)  # once a pack

    def beside(run: Any, *arguments: Any) -> tuple[Any, int, int]:
        with Traffic() as traffic:
            out = run("flash", *arguments, layout.table, 0.1)
        ops = [op for op in traffic.ops if "flash" not in op.name]
        moved = sum(size * dtype.itemsize for op in ops for size, dtype in op.moved)
        return out, len(ops), moved // 10**6

    forward, backward = shared_prefix_attention._forward, shared_prefix_attention._backward
    made, ops, moved = beside(forward, *qkv)
    assert (ops, moved) == (0, 0) and 1 <= len(launches) <= limit_of(f"{BESIDE}, forward")
    assert sum(launches) / 1e6 <= limit_of("MB of these launches")
    _, ops, moved = beside(backward, torch.empty_like(made[0]), *qkv, *made)
    assert len(launches) == 1 and moved == 145
    assert ops <= limit_of(f"{BESIDE}, backward")


def version2() -> ModuleType:
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
        fill((dq, dk, dv), flash_kernels.varlen_backward(dout, q, k, v, out, softmax_lse, *numbers))
        return q.new_empty(0)

    module.__dict__.update(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward, _flash_attn_varlen_backward=_flash_attn_varlen_backward
    )
    return module


def version3() -> ModuleType:
    """flash_attn_interface of version 3.0.0."""
    module = ModuleType("flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None,
        kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None,
        k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
    ):  # fmt: skip
        numbers = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
        return *flash_kernels.varlen_forward(q, k, v, *numbers), q.new_empty(0), q.new_empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        numbers = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, softmax_scale)
        fill((dq, dk, dv), flash_kernels.varlen_backward(dout, q, k, v, out, softmax_lse, *numbers))
        return q.new_empty(0)

    module.__dict__.update(_flash_attn_forward=_flash_attn_forward, _flash_attn_backward=_flash_attn_backward)
    return module


def version4() -> ModuleType:
    """flash_attn.cute.interface of version 4.0.0 beta 27; the log-sum-exp is there only if it is asked for."""
    module = ModuleType("flash_attn.cute.interface")

    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, *, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        numbers = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
        found, sums = flash_kernels.varlen_forward(q, k, v, *numbers)
        return found, sums if return_lse else None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        numbers = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
        fill((dq, dk, dv), flash_kernels.varlen_backward(dout, q, k, v, out, lse, *numbers))
        return dq, dk, dv

    module.__dict__.update(_flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    return module


def fill(places: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for there, value in zip(places, values, strict=True):
        there.copy_(value)


@pytest.mark.parametrize(
    ("impl", "package"), [("flash", version2), ("flash3", version3), ("flash4", version4)], ids=["2", "3", "4"]
)
def test_calls_of_the_packages(impl: str, package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their arguments, and results equal to separate sequences; the plain kernels check shapes and strides."""
    module = package()
    parents = [ModuleType(name) for name in ("flash_attn", "flash_attn.cute")]
    for each in (*parents, module):
        each.__spec__, each.__path__ = ModuleSpec(each.__name__, None), []
        monkeypatch.setitem(sys.modules, each.__name__, each)
    monkeypatch.setattr(packages, "missing", lambda version: None)
    layout, heads = CASES["groups without branches"]
    ours = partial(getattr(shared_prefix_attention, impl), layout=layout, scale=0.3)
    oracle = partial(separately, layout=layout, scale=0.3)
    assert_equals(ours, oracle, cases.tensors(layout.total_length, *heads), device=DEVICE)
    options: dict[str, Any] = {"cu_seqlens": offsets((3, 5)).to(DEVICE), "max_length": 5, "scale": 0.3}
    oracle = partial(one_by_one, lengths=(3, 5), scale=0.3)
    ours = partial(getattr(varlen_attention, impl), **options)
    assert_equals(ours, oracle, cases.tensors(8, 4, 2, 16), device=DEVICE)


FILES = {2: "flash_attn/flash_attn_interface.py", 3: "flash_attn_interface.py", 4: "flash_attn/cute/__init__.py"}
INSTALLED = {  # version that is asked for; version and file of a distribution of its name; why it is not used
    "2.7.0": (2, "2.7.0", FILES[2], None),
    "2.10": (2, "2.10.1.post1", FILES[2], None),
    "before 2.7": (2, "2.6.3", FILES[2], "needs 2.7 or later, below 3"),
    "version 3 under the name of 2": (2, "3.0.0b1", FILES[3], "needs 2.7 or later, below 3"),
    "version 4 beside the metadata of 2": (2, "2.8.3", FILES[4], "has no module flash_attn.flash_attn_interface"),
    "version 3 with the module of 2": (2, "3.0.0b1", FILES[2], "needs 2.7 or later, below 3"),
    "3.0.0": (3, "3.0.0+cu128torch2.9", FILES[3], None),
    "3.0.0 beta": (3, "3.0.0b1", FILES[3], "needs 3.0 or later, below 4"),
    "3.0.0 without its module": (3, "3.0.0", FILES[2], "has no module flash_attn_interface"),
    "4.0.0 beta": (4, "4.0.0b27", FILES[4], None),
    "4.0.0 without its module": (4, "4.0.0b27", FILES[2], "has no module flash_attn.cute"),
}


@pytest.mark.parametrize(("asked", "version", "file", "reason"), INSTALLED.values(), ids=INSTALLED.keys())
def test_only_packages_with_the_known_functions_are_used(
    asked: int, version: str, file: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / file).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages.metadata, "version", {packages._PACKAGES[asked].name: version}.__getitem__)
    with patch.dict(sys.modules):
        for name in ("flash_attn", "flash_attn.flash_attn_interface", "flash_attn.cute", "flash_attn_interface"):
            sys.modules.pop(name, None)
        found = packages._PACKAGES[asked].missing()
    assert found is None if reason is None else reason in str(found)


@on_gpu
def test_nothing_waits_for_the_device() -> None:
    layout, heads = CASES["many groups"]
    attention = partial(vlmr1_kernels.shared_prefix_attention, layout=layout, impl="flash")
    q, k, v, d_out = (value.to("cuda", torch.bfloat16) for value in tensors(layout.total_length, *heads))
    leaves = [each.requires_grad_() for each in (q, k, v)]
    sequences.plan.cache_clear()
    with no_waiting():
        torch.autograd.grad(attention(*leaves), leaves, d_out)
