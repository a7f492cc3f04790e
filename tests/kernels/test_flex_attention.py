"""FlexAttention: the block mask against the definition, and the compiled function, which on a CPU runs unfused."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torch_flex

import vlmr1_kernels
from tests.helpers.attention import CASES, assert_equals, check_budget, separately, tensors, with_gradients
from tests.helpers.kernel_cases import on_gpu
from vlmr1_kernels import PrefixLayout
from vlmr1_kernels.flex import shared_prefix_attention as flex
from vlmr1_kernels.flex.mask import BLOCK, tables, visible_ranges
from vlmr1_kernels.reference.shared_prefix_attention import visible

SLOW = pytest.mark.slow
LAYOUTS = {name: layout for name, (layout, _) in CASES.items()} | {
    "whole blocks": PrefixLayout((256,), ((128, 256), (1,))[:1]),
    "blocks of no one": PrefixLayout((300, 300), ((10, 200), (150, 7))),
}
WINDOWS = (None, 1, 5, 140, 1000)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_blocks_are_those_that_torch_finds(layout: PrefixLayout, window: int | None) -> None:
    seen, length = visible(layout, window), layout.total_length
    own, first, last = (each[:, None] for each in visible_ranges(layout, window))
    row, key = torch.arange(length)[:, None], torch.arange(length)[None]
    assert torch.equal(seen, ((key >= own) & (key <= row)) | ((key >= first) & (key < last)))

    def mask(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return seen[row, key]

    theirs = torch_flex.create_block_mask(mask, None, None, length, length, device="cpu", BLOCK_SIZE=BLOCK)
    ours = tables(layout, window, torch.device("cpu"))
    for name, counts, places in (
        ("kv", ours.key_counts, ours.keys),
        ("full_kv", ours.full_key_counts, ours.full_keys),
        ("q", ours.query_counts, ours.queries),
        ("full_q", ours.full_query_counts, ours.full_queries),
    ):
        assert torch.equal(counts, getattr(theirs, f"{name}_num_blocks")), name
        assert torch.equal(places, getattr(theirs, f"{name}_indices")), name
        assert counts.is_contiguous(), name  # the kernels count on it
        assert places.is_contiguous(), name


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced as on CUDA, run by torch's unfused definition, which has a backward."""
    torch._dynamo.reset()
    compiled = torch.compile(flex.attend, dynamic=True, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *qkv: None)
    yield
    torch._dynamo.reset()


VALUES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 0.7},
    "window": {"window": 5},
    "softcap and window": {"softcap": 1.5, "window": 9},
}


COMBINATIONS = [
    pytest.param(case, options, id=f"{case}-{name}", marks=[] if case == "grouped heads" and not options else [SLOW])
    for case in ("grouped heads", "groups without branches", "longer than a block")
    for name, options in VALUES.items()
]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("case", "options"), COMBINATIONS)
def test_equals_separate_sequences(case: str, options: dict[str, Any]) -> None:
    layout, heads = CASES[case]
    problem = [value.float().double() for value in tensors(layout.total_length, *heads)]
    options = {"layout": layout, "scale": 0.3, "window": None, **options}
    ours = partial(flex.shared_prefix_attention, **options)
    assert_equals(ours, partial(separately, **options), problem, torch.float32, rtol=1e-4, atol=1e-5)


def compiled_for(layouts: list[PrefixLayout], device: str, dtype: torch.dtype) -> list[int]:
    """Graphs that were compiled up to each layout. H is the number of blocks of one of them, Dh that of rows."""
    found = []
    for layout in layouts:
        attention = partial(flex.shared_prefix_attention, layout=layout, scale=0.3, window=None)
        with_gradients(attention, tensors(layout.total_length, 4, 2, 16), dtype, device=device)
        found.append(counters["stats"]["unique_graphs"])
    return found


NEW_LAYOUTS = [
    PrefixLayout((150, 70), ((90, 140), (33,))),  # 4 blocks
    PrefixLayout((250, 170, 1), ((90, 140), (33, 7), ())),
    PrefixLayout((256,), ((0, 2, 126),)),  # whole blocks
    PrefixLayout((101,), ((40, 40),)),
]


@pytest.mark.usefixtures("on_cpu")
def test_a_new_layout_does_not_recompile() -> None:
    counters.clear()
    assert compiled_for(NEW_LAYOUTS, "cpu", torch.float32) == [1, 1, 1, 1]
    short = [PrefixLayout((13, 4), ((0, 2), (9,))), PrefixLayout((20,), ((5,),))]
    assert compiled_for(short, "cpu", torch.float32) == [2, 2], "one block only is a graph of its own"


@on_gpu
@pytest.mark.parametrize(
    ("case", "dtype", "options"),
    [
        ("grouped heads", torch.bfloat16, {}),
        ("longer than a block", torch.float32, {}),
        ("very different lengths", torch.bfloat16, {"softcap": 1.5, "window": 9}),
    ],
    ids=str,
)
def test_error_is_within_budget(case: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    layout, heads = CASES[case]
    ours = partial(vlmr1_kernels.shared_prefix_attention, layout=layout, impl="flex", **options)
    oracle = partial(separately, layout=layout, scale=heads[2] ** -0.5, **options)
    check_budget(ours, oracle, (layout.total_length, *heads), dtype, "cuda")


@on_gpu
def test_a_new_layout_does_not_recompile_on_a_gpu() -> None:
    torch._dynamo.reset()
    counters.clear()
    assert compiled_for(NEW_LAYOUTS, "cuda", torch.bfloat16) == [1, 1, 1, 1]
