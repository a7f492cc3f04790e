from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.decode_cases import Arguments, Case, cast, check_budget, one_by_one, suffix_rows
from tests.helpers.kernel_cases import Target
from vlmr1_kernels import PrefixLayout, shared_prefix_attention, shared_prefix_decode

OP = "shared_prefix_decode"
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


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_within_budget(case: Case, target: Target, poison: None) -> None:
    # The interpreter multiplies bfloat16 as integers.
    for dtype in (torch.float32, torch.float16 if target.interpreted else torch.bfloat16):
        out = check_budget(target.run(dtype), case.draw(), dtype, target.device)
        assert torch.equal(out[case.branches :], torch.zeros_like(out[case.branches :]))


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
