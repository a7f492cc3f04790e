from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.conftest import Target, targets
from vlmr1_kernels import PrefixLayout, shared_prefix_attention, shared_prefix_decode
from vlmr1_kernels.testing import assert_within_budget

OP = "shared_prefix_decode"
Arguments = dict[str, Any]
ANYTHING = 2**30 + 7  # in the place of numbers that must not be read


@dataclass(frozen=True)
class Case:
    """Groups in one pool: rows of each prefix, branches of each group, tokens of each branch's suffix."""

    prefixes: tuple[int, ...]
    sizes: tuple[int, ...]
    suffixes: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    block: int = 4
    blocks: int | None = None  # M; default: what the longest suffix needs, and one
    padding: int = 0  # branches of no group
    scale: float | None = None

    @property
    def branches(self) -> int:
        return sum(self.sizes)

    def draw(self) -> Arguments:
        """float64. The prefixes in reverse order and apart, then the blocks, shuffled; every other row is NaN."""
        batch, needed = self.branches + self.padding, -(-max(self.suffixes, default=0) // self.block)
        width = needed + 1 if self.blocks is None else self.blocks
        starts, row = [], 1
        for length in reversed(self.prefixes):
            starts.insert(0, row)
            row += length + 1
        first_block = -(-row // self.block)
        blocks = torch.randperm(batch * width).view(batch, width) + first_block
        rows = self.block * (first_block + batch * width)
        pool = torch.full((2, self.kv_heads, rows, self.head_dim), torch.nan, dtype=torch.float64)
        for start, length, size in zip(starts, self.prefixes, self.sizes, strict=True):
            pool[:, :, start : start + (length if size else 0)] = 0
        for own, length in zip(blocks, self.suffixes, strict=False):
            pool[:, :, suffix_rows(own.tolist(), length, self.block)] = 0
            own[-(-length // self.block) :] = ANYTHING
        blocks[self.branches :] = -ANYTHING
        q = torch.randn(batch, self.heads, self.head_dim, dtype=torch.float64)
        q[self.branches :] = torch.nan
        empty = [size == 0 for size in self.sizes]
        offsets = [sum(self.sizes[:group]) for group in range(len(self.sizes) + 1)]
        keys, values = pool + torch.randn_like(pool)
        return {
            "q": q,
            "keys": keys,
            "values": values,
            "group_offsets": int32(offsets),
            "prefix_starts": int32([ANYTHING if no else start for start, no in zip(starts, empty, strict=True)]),
            "prefix_lengths": int32([ANYTHING if no else n for n, no in zip(self.prefixes, empty, strict=True)]),
            "suffix_blocks": blocks.int(),
            "suffix_lengths": int32([*self.suffixes, *[ANYTHING] * self.padding]),
            "block": self.block,
            "scale": self.scale,
        }


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def suffix_rows(blocks: list[int], length: int, block: int) -> list[int]:
    return [blocks[t // block] * block + t % block for t in range(length)]


def cast(arguments: Arguments, dtype: torch.dtype, device: str = "cpu") -> Arguments:
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }


def one_by_one(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    group_offsets: Tensor,
    prefix_starts: Tensor,
    prefix_lengths: Tensor,
    suffix_blocks: Tensor,
    suffix_lengths: Tensor,
    block: int,
    scale: float | None,
) -> Tensor:
    """Each branch over its own keys, gathered, heads repeated; zeros for padding."""
    out = torch.zeros_like(q)
    repeat = q.shape[1] // len(keys)
    for group, (first, last) in enumerate(pairwise(group_offsets.tolist())):
        for b in range(first, last):
            start = int(prefix_starts[group])
            rows = [*range(start, start + int(prefix_lengths[group]))]
            rows += suffix_rows(suffix_blocks[b].tolist(), int(suffix_lengths[b]), block)
            k, v = (pool[:, rows].repeat_interleave(repeat, 0) for pool in (keys, values))  # [H, n, Dh]
            scores = (q[b, :, None] @ k.mT) * (q.shape[2] ** -0.5 if scale is None else scale)
            out[b] = (torch.softmax(scores, -1) @ v)[:, 0]
    return out


CASES = {
    "one group": Case((9,), (8,), (5,) * 8, kv_heads=4),
    "one branch, one row each": Case((1,), (1,), (1,), heads=2, head_dim=64),
    "unequal groups": Case((9, 1, 4), (2, 1, 3), (3, 1, 7, 5, 6, 2), heads=8, head_dim=80),
    "a group without branches left": Case((5, 7, 3), (2, 0, 1), (9, 2, 5)),
    "no suffix yet": Case((5, 7), (2, 1), (0, 0, 0)),
    "no blocks": Case((5,), (2,), (0, 0), blocks=0),
    "suffixes of 0 and 1 tokens": Case((6, 2), (2, 2), (0, 1, 5, 0)),
    "suffixes that end with a block": Case((3,), (4,), (4, 8, 12, 5)),
    "blocks of one token": Case((3,), (2,), (4, 6), block=1),
    "blocks of an odd size": Case((3, 4), (1, 2), (4, 6, 11), block=5),
    "padding": Case((5, 7), (2, 1), (3, 4, 0), padding=3),
    "nothing but padding": Case((5,), (0,), (), padding=2),
    "one key head, head dimension 128": Case((5, 7), (3, 2), (4, 1, 2, 9, 3), heads=8, kv_heads=1, head_dim=128),
    "a scale": Case((6,), (2,), (3, 4), heads=6, head_dim=64, scale=0.3),
    "odd head dimension": Case((6,), (2,), (3, 4), head_dim=17),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_separate_sequences(case: Case, poison: None) -> None:
    arguments = case.draw()
    torch.testing.assert_close(shared_prefix_decode(**arguments), one_by_one(**arguments))


def dtypes(target: Target) -> tuple[torch.dtype, ...]:
    # The interpreter multiplies bfloat16 as integers.
    return (torch.float32, torch.float16 if target.interpreted else torch.bfloat16)


@pytest.mark.parametrize("target", targets(OP))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_within_budget(case: Case, target: Target, poison: None) -> None:
    for dtype in dtypes(target):
        arguments = cast(case.draw(), dtype)
        out = target.run(dtype)(**cast(arguments, dtype, target.device)).cpu()
        assert out.dtype == dtype
        exact = one_by_one(**cast(arguments, torch.float64))
        assert_within_budget(["out"], [out], [one_by_one(**arguments)], [exact])
        assert torch.equal(out[case.branches :], torch.zeros_like(out[case.branches :]))


@pytest.mark.parametrize("target", targets(OP))
def test_strides_do_not_matter(target: Target) -> None:
    arguments = cast(CASES["unequal groups"].draw(), torch.float32, target.device)
    run = target.run(torch.float32)
    expected = run(**arguments)
    strided = dict(arguments)
    strided["q"] = arguments["q"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["keys"] = arguments["keys"].transpose(0, 1).contiguous().transpose(0, 1)  # held as [R, Hkv, Dh]
    strided["values"] = torch.stack([arguments["values"]] * 2, 2)[:, :, 1]
    strided["suffix_blocks"] = torch.cat([arguments["suffix_blocks"]] * 2, 1)[:, : arguments["suffix_blocks"].shape[1]]
    torch.testing.assert_close(run(**strided), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("target", targets(OP))
def test_a_nan_stays_with_those_who_read_it(target: Target) -> None:
    case = CASES["unequal groups"]
    arguments = cast(case.draw(), torch.float32, target.device)
    arguments["q"][2] = torch.nan
    arguments["values"][:, arguments["prefix_starts"][0]] = torch.nan
    own = arguments["suffix_blocks"][4].tolist()
    arguments["values"][:, suffix_rows(own, 1, case.block)] = torch.nan
    out = target.run(torch.float32)(**arguments)
    assert out.isnan().flatten(1).any(1).tolist() == [True, True, True, False, True, False]


def test_is_the_last_row_of_the_packed_attention() -> None:
    case = Case((4, 6), (3, 2), (5,) * 5)
    arguments = case.draw()
    layout = PrefixLayout(case.prefixes, ((5,) * 3, (5,) * 2))
    rows = [
        row
        for start, length in zip(arguments["prefix_starts"].tolist(), case.prefixes, strict=True)
        for row in range(start, start + length)
    ]
    for blocks in arguments["suffix_blocks"].tolist():
        rows += suffix_rows(blocks, 5, case.block)
    last = [offset + 4 for group in layout.branch_offsets for offset in group]
    q = torch.zeros(1, 4, layout.total_length, 16, dtype=torch.float64)
    q[0, :, last] = arguments["q"].transpose(0, 1)
    keys, values = (arguments[name][None, :, rows] for name in ("keys", "values"))
    expected = shared_prefix_attention(q, keys, values, layout)[0, :, last].transpose(0, 1)
    torch.testing.assert_close(shared_prefix_decode(**arguments), expected)


class LargestCopy(TorchDispatchMode):
    """Numbers in the largest tensor that an op makes anew."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            held = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
            if out.untyped_storage().data_ptr() not in held:
                self.largest = max(self.largest, out.numel())
        return out


def test_the_reference_does_not_copy_a_prefix() -> None:
    arguments = Case((400, 300), (3, 4), (2,) * 7, head_dim=64).draw()
    with LargestCopy() as made:
        shared_prefix_decode(**arguments, impl="reference")
    assert made.largest <= 14 * 2 * 402  # the scores; a prefix is 2 * 300 * 64


def test_bounds_that_the_values_break_are_named_on_a_cpu() -> None:
    arguments = Case((5, 7), (2, 3), (1,) * 5).draw()
    too_small: tuple[Arguments, ...] = ({"max_group": 2}, {"max_prefix": 6})
    for bounds in too_small:
        with pytest.raises(ValueError, match="a group has 3 branches and 7 rows, max_group is"):
            shared_prefix_decode(**arguments, **bounds)
    shared_prefix_decode(**arguments, max_group=3, max_prefix=7)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


I32 = torch.int32
BAD: dict[str, tuple[Arguments, str]] = {
    "q": ({"q": zeros(4, 8)}, r"q must be \[B, H, Dh\], it is \[4, 8\]"),
    "heads": ({"q": zeros(4, 3, 8)}, "3 query heads are not a multiple of 2"),
    "head dimension": ({"keys": zeros(2, 9, 7)}, r"keys must be \[Hkv, R, 8\].*\[2, 9, 7\]"),
    "last stride": ({"values": zeros(2, 8, 9).mT}, r"values must be .* contiguous last.*\[72, 1, 9\]"),
    "pools": ({"values": zeros(2, 9, 8)}, r"keys is \[2, \d+, 8\], values is \[2, 9, 8\]"),
    "dtype": ({"values": zeros(2, 9, 8).half()}, "values is torch.float16, q is torch.float32"),
    "no group": ({"group_offsets": zeros(1, dtype=I32)}, r"group_offsets must be \[P \+ 1\], P at least 1"),
    "int64": ({"group_offsets": torch.tensor([0, 2, 4])}, r"group_offsets must be int32 \[3\], it is torch.int64"),
    "starts": ({"prefix_starts": zeros(3, dtype=I32)}, r"prefix_starts must be int32 \[2\], it is .* \[3\]"),
    "lengths": ({"prefix_lengths": zeros(2)}, r"prefix_lengths must be int32 \[2\], it is torch.float32"),
    "blocks": ({"suffix_blocks": zeros(4, dtype=I32)}, r"suffix_blocks must be \[4, M\]"),
    "rows of blocks": ({"suffix_blocks": zeros(5, 2, dtype=I32)}, r"suffix_blocks must be int32 \[4, 2\], .*\[5, 2\]"),
    "suffixes": ({"suffix_lengths": zeros(4, 1, dtype=I32)}, r"suffix_lengths must be int32 \[4\], .*\[4, 1\]"),
    "device": ({"suffix_lengths": zeros(4, dtype=I32).to("meta")}, "suffix_lengths is on meta, q is on cpu"),
    "block": ({"block": 0}, "block must be at least 1, it is 0"),
    "max_group": ({"max_group": 0}, "max_group must be at least 1"),
    "max_prefix": ({"max_prefix": -1}, "max_prefix must be at least 1"),
    "gradient": ({"q": zeros(4, 4, 8).requires_grad_()}, "has no gradient"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_named(change: Arguments, message: str) -> None:
    good = cast(Case((3, 2), (2, 2), (3,) * 4, head_dim=8).draw(), torch.float32)
    with pytest.raises(ValueError, match=message):
        shared_prefix_decode(**{**good, **change})
