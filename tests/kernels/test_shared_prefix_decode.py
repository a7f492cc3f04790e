from typing import Any

import pytest
import torch
from torch import Tensor

from vlmr1_kernels import PrefixLayout, shared_prefix_attention, shared_prefix_decode
from vlmr1_kernels.testing import assert_within_budget

Arguments = dict[str, Any]


def state(
    prefixes: list[int], members: int, heads: int, kv_heads: int, head_dim: int, suffix: int, room: int = 0
) -> Arguments:
    """float64; `room` rows more than the longest length in both caches."""
    batch, longest = len(prefixes) * members, max(prefixes) + room
    return {
        "q": torch.randn(batch, heads, head_dim, dtype=torch.float64),
        "prefix_k": torch.randn(len(prefixes), kv_heads, longest, head_dim, dtype=torch.float64),
        "prefix_v": torch.randn(len(prefixes), kv_heads, longest, head_dim, dtype=torch.float64),
        "prefix_lengths": torch.tensor(prefixes),
        "suffix_k": torch.randn(batch, kv_heads, suffix + room, head_dim, dtype=torch.float64),
        "suffix_v": torch.randn(batch, kv_heads, suffix + room, head_dim, dtype=torch.float64),
        "suffix_lengths": suffix,
    }


def one_by_one(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_lengths: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    suffix_lengths: int | Tensor,
    scale: float | None = None,
) -> Tensor:
    """Each sequence over its own concatenated keys, heads repeated."""
    batch, heads, head_dim = q.shape
    members, repeat = batch // len(prefix_k), heads // prefix_k.shape[1]
    lengths = [suffix_lengths] * batch if isinstance(suffix_lengths, int) else suffix_lengths.tolist()
    out = []
    for i in range(batch):
        group, own = i // members, lengths[i]
        prefix = int(prefix_lengths[group])
        k = torch.cat([prefix_k[group, :, :prefix], suffix_k[i, :, :own]], 1).repeat_interleave(repeat, 0)
        v = torch.cat([prefix_v[group, :, :prefix], suffix_v[i, :, :own]], 1).repeat_interleave(repeat, 0)
        scores = (q[i, :, None] @ k.mT) * (head_dim**-0.5 if scale is None else scale)  # [H, 1, n]
        out.append((torch.softmax(scores, -1) @ v)[:, 0])
    return torch.stack(out)


def cast(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


CASES: dict[str, tuple[Arguments, Arguments]] = {
    "one group": (
        {"prefixes": [9], "members": 8, "heads": 4, "kv_heads": 4, "head_dim": 16, "suffix": 5},
        {},
    ),
    "one sequence, one row": (
        {"prefixes": [1], "members": 1, "heads": 2, "kv_heads": 2, "head_dim": 64, "suffix": 1},
        {},
    ),
    "ragged prefixes": (
        {"prefixes": [9, 1, 4], "members": 2, "heads": 8, "kv_heads": 2, "head_dim": 80, "suffix": 3},
        {},
    ),
    "room in the caches": (
        {
            "prefixes": [5, 7],
            "members": 3,
            "heads": 6,
            "kv_heads": 1,
            "head_dim": 128,
            "suffix": 4,
            "room": 5,
        },
        {"scale": 0.2},
    ),
    "no suffix yet": (
        {"prefixes": [5, 7], "members": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "suffix": 0, "room": 3},
        {},
    ),
    "ragged suffixes": (
        {"prefixes": [5, 7], "members": 2, "heads": 4, "kv_heads": 2, "head_dim": 17, "suffix": 6},
        {"suffix_lengths": torch.tensor([1, 6, 0, 3])},
    ),
}


@pytest.mark.parametrize(("shape", "options"), CASES.values(), ids=CASES.keys())
def test_equals_separate_sequences(shape: Arguments, options: Arguments) -> None:
    arguments = {**state(**shape), **options}
    torch.testing.assert_close(shared_prefix_decode(**arguments), one_by_one(**arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "options"), CASES.values(), ids=CASES.keys())
def test_error_is_within_budget(shape: Arguments, options: Arguments, dtype: torch.dtype) -> None:
    arguments = cast({**state(**shape), **options}, dtype)
    out = shared_prefix_decode(**arguments)
    assert out.dtype == dtype
    exact = one_by_one(**cast(arguments, torch.float64))
    assert_within_budget(["out"], [out], [one_by_one(**arguments)], [exact])


def test_is_the_last_row_of_the_packed_attention() -> None:
    prompts, members, suffix = [4, 6], 3, 5
    arguments = state(prompts, members, 4, 2, 16, suffix)
    layout = PrefixLayout(tuple(prompts), ((suffix,) * members,) * 2)

    def packed(name: str) -> Tensor:
        prefix, own = arguments[f"prefix_{name}"], arguments[f"suffix_{name}"]
        rows = [prefix[i, :, :length] for i, length in enumerate(prompts)] + list(own)
        return torch.cat(rows, dim=1)[None]  # [1, Hkv, L, Dh]

    last = [offset + suffix - 1 for group in layout.branch_offsets for offset in group]
    q = torch.zeros(1, 4, layout.total_length, 16, dtype=torch.float64)
    q[0, :, last] = arguments["q"].transpose(0, 1)
    expected = shared_prefix_attention(q, packed("k"), packed("v"), layout)[0, :, last].transpose(0, 1)
    torch.testing.assert_close(shared_prefix_decode(**arguments), expected)


def test_strides_of_the_query_do_not_matter() -> None:
    arguments = state([3, 4], 2, 4, 2, 8, 2)
    expected = shared_prefix_decode(**arguments)
    arguments["q"] = arguments["q"].transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(shared_prefix_decode(**arguments), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 4, 8)}, "P divide 5"),
        ({"q": torch.zeros(4, 3, 8)}, "3 query heads are no multiple of 2"),
        ({"prefix_v": torch.zeros(2, 2, 4, 8)}, r"prefix_v must be \[2, 2, 3, 8\]"),
        ({"prefix_lengths": torch.tensor([3])}, r"prefix_lengths must be \[2\]"),
        ({"suffix_k": torch.zeros(3, 2, 6, 8)}, r"suffix_k and suffix_v must be \[4, 2, T, 8\]"),
        ({"suffix_lengths": 7}, r"suffix_lengths is 7; the suffix holds 0..6"),
        ({"suffix_lengths": torch.zeros(4)}, "suffix_lengths must be int64 or int32"),
        ({"suffix_v": torch.zeros(4, 2, 6, 8).half()}, "suffix_v is torch.float16, q is torch.float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(change: Arguments, message: str) -> None:
    good = cast(state([3, 2], 2, 4, 2, 8, 6), torch.float32)
    with pytest.raises(ValueError, match=message):
        shared_prefix_decode(**{**good, **change})
