"""Particulars of the Triton implementation of the decode step: chunks, tiles, machine code, CUDA graphs."""

from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.decode_cases import Arguments, Case, cast, check_budget, int32, one_by_one
from tests.helpers.kernel_cases import DEVICE, on_device, on_gpu
from vlmr1_kernels import shared_prefix_decode
from vlmr1_kernels.inputs import DecodeTables
from vlmr1_kernels.testing import assert_within_budget, relative_error

triton = pytest.importorskip("triton")

pytestmark = on_device
HALF = torch.float16  # the interpreter multiplies bfloat16 as integers
MODULE = "vlmr1_kernels.triton.shared_prefix_decode"


triton_decode = partial(shared_prefix_decode, impl="triton")


def run(arguments: Arguments, dtype: torch.dtype, **options: Any) -> Tensor:
    return triton_decode(**cast(arguments, dtype, DEVICE), **options).cpu()


CASES: dict[str, tuple[Case, torch.dtype]] = {
    "chunks of a prefix": (Case((300, 129), (2, 1), (1, 0, 2), head_dim=32), torch.float32),
    "chunks of a suffix": (Case((3,), (3,), (300, 128, 5), head_dim=32, block=16), torch.float32),
    "chunks of both, half precision": (Case((200, 3), (2, 1), (140, 1, 0), head_dim=64, block=16), HALF),
    "tiles of a group, float32": (Case((37,), (7,), (3,) * 7, heads=8, kv_heads=1), torch.float32),  # 4 of 16
    "tiles of a group, half precision": (Case((37,), (9,), (3,) * 9, heads=8, kv_heads=1), HALF),  # 2 of 64
    "a group of one tile, one of two": (Case((9, 5), (2, 5), (1,) * 7, heads=8), torch.float32),
    "more query heads than rows of a tile": (Case((9,), (2,), (3, 1), heads=40, kv_heads=2), torch.float32),
    "head dimension 80, half precision": (Case((70,), (3,), (3, 1, 66), head_dim=80), HALF),
    "head dimension 128, half precision": (Case((70,), (3,), (3, 1, 5), head_dim=128), HALF),
    "head dimension 256": (Case((20,), (2,), (3, 1), head_dim=256), torch.float32),
}


@pytest.mark.parametrize(("case", "dtype"), CASES.values(), ids=CASES.keys())
def test_chunks_and_tiles(case: Case, dtype: torch.dtype, poison: None) -> None:
    check_budget(triton_decode, case.draw(), dtype, DEVICE)


def test_more_partial_results_than_one_block_merges(monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    monkeypatch.setattr(import_module(MODULE), "LEAST_CHUNK", 16)
    arguments = Case((33 * 16, 5), (2, 1), (40, 1, 0), block=16).draw()  # 33 and 3
    check_budget(triton_decode, arguments, torch.float32, DEVICE)


@pytest.mark.parametrize(("processors", "chunks"), [(24, 24), (132, 64)])
def test_chunks_of_a_prefix_fill_the_device(processors: int, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs an SM, at most 64 chunks."""
    module, launched = import_module(MODULE), []
    monkeypatch.setattr(module, "processors", lambda device: processors)
    monkeypatch.setattr(module, "shared_memory", lambda device: 2**20)
    monkeypatch.setattr(module, "launch", lambda kernel, programs, *args, **options: launched.append(programs))
    case = Case((9,), (2,), (3, 1), heads=4, kv_heads=2, head_dim=16, block=16)
    module._forward(*_inputs(case), block=16, max_group=2, max_prefix=100_000, scale=1.0)
    suffixes = 2 * 2  # branches and key heads
    assert launched[0] == 2 * chunks + suffixes


def _inputs(case: Case) -> tuple[Any, ...]:
    """Queries, keys, values and tables, on a CPU."""
    drawn = cast(case.draw(), torch.float32)
    return drawn["q"], drawn["keys"], drawn["values"], DecodeTables(*(drawn[name] for name in DecodeTables._fields))


def test_bounds_may_be_generous(poison: None) -> None:
    case = Case((150, 5), (3, 1), (20, 3, 0, 1))
    arguments = case.draw()
    exact = one_by_one(**arguments)
    for bounds in ({"max_group": 3, "max_prefix": 150}, {"max_group": 64, "max_prefix": 9999}, {}):
        assert relative_error(run(arguments, torch.float32, **bounds), exact) < 1e-6


def test_scores_of_any_size_do_not_overflow(poison: None) -> None:
    arguments = Case((150,), (2,), (5, 0)).draw()
    for shift in (3e4, -3e4):
        moved = arguments | {"q": 0 * arguments["q"] + shift, "keys": arguments["keys"].nan_to_num(0).abs()}
        assert relative_error(run(moved, torch.float32), one_by_one(**moved)) < 1e-3


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_on_the_device(head_dim: int, dtype: torch.dtype, poison: None) -> None:
    suffixes = (0, 1, 300, 17, 64, 65, 2, 128, 129, 5)
    case = Case((1500, 1, 300), (3, 6, 1), suffixes, 16, 2, head_dim, block=16, padding=2)
    check_budget(triton_decode, case.draw(), dtype, DEVICE)


@on_gpu
def test_one_graph_serves_all_lengths() -> None:
    cases = (
        Case((700, 60, 5), (4, 2, 3), (9, 1, 0, 200, 33, 64, 7, 8, 128), 16, 2, 128, 16, blocks=13),
        Case((3, 800, 90), (1, 5, 0), (90, 100, 3, 0, 17, 208), 16, 2, 128, 16, blocks=13, padding=3),
        Case((40, 1, 2), (0, 0, 9), (1,) * 9, 16, 2, 128, 16, blocks=13),
    )
    drawn = [cast(case.draw(), torch.bfloat16) for case in cases]
    rows = max(each["keys"].shape[1] for each in drawn)
    for each in drawn:
        for name in ("keys", "values"):
            each[name] = torch.nn.functional.pad(each[name], (0, 0, 0, rows - each[name].shape[1]), value=torch.nan)
    static = cast(drawn[0], torch.bfloat16, "cuda")

    def step() -> Tensor:
        return shared_prefix_decode(**static, max_group=9, max_prefix=1000, impl="triton")

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a wait for the device would end it
        out = step()
    for arguments in drawn:
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                static[name].copy_(value)
        out.fill_(torch.nan)
        graph.replay()
        exact = one_by_one(**cast(arguments, torch.float64))
        assert_within_budget(["out"], [out.cpu()], [one_by_one(**arguments)], [exact])


@on_gpu
def test_a_pool_of_more_than_2_31_numbers() -> None:
    rows = 2**24 + 4  # of each of two heads
    pool = torch.full((2, rows, 128), torch.nan, dtype=torch.bfloat16, device="cuda")
    pool[:, -8:] = torch.randn(2, 8, 128)
    arguments: Arguments = {
        "q": torch.randn(2, 4, 128, dtype=torch.bfloat16),
        "group_offsets": int32([0, 2]),
        "prefix_starts": int32([rows - 8]),
        "prefix_lengths": int32([3]),
        "suffix_blocks": int32([rows // 2 - 2, rows // 2 - 1])[:, None],
        "suffix_lengths": int32([2, 1]),
        "block": 2,
        "scale": None,
    }
    out = shared_prefix_decode(**cast(arguments, torch.bfloat16, "cuda"), keys=pool, values=pool, impl="triton")
    last = pool[:, -8:].cpu()
    arguments |= {"prefix_starts": int32([0]), "suffix_blocks": int32([2, 3])[:, None], "keys": last, "values": last}
    exact = one_by_one(**cast(arguments, torch.float64))
    assert_within_budget(["out"], [out.cpu()], [one_by_one(**arguments)], [exact])
