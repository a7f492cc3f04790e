from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.decode_cases import Arguments, RopeCase, cast
from tests.helpers.kernel_cases import Target
from vlmr1_kernels import rope_kv_write
from vlmr1_kernels.testing import assert_within_budget

OP = "rope_kv_write"
NAMES = ("q", "keys", "values")


CASES = {
    "halves": RopeCase(),
    "halves, norms": RopeCase(norms=True, heads=6, kv_heads=3, head_dim=20, rotary=20),
    "a part, adjacent pairs": RopeCase(rotary=6, interleaved=True, kv_heads=1),
    "a part of an odd width, norms": RopeCase(head_dim=17, rotary=8, norms=True),
    "adjacent pairs, norms": RopeCase(interleaved=True, norms=True, head_dim=128, rotary=128),
    "no token": RopeCase(tokens=0),
}


def plain(q: Any, k: Any, v: Any, cos: Any, sin: Any, keys: Any, values: Any, rows: Any, interleaved: bool, eps: float,
          q_norm: Any = None, k_norm: Any = None) -> list[Tensor]:  # fmt: skip
    """Pairs as complex numbers, turned by their angle; token by token."""

    def turned(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = norm * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        part, half = x[..., : cos.shape[1]], cos.shape[1] // 2
        first, second = (part[..., ::2], part[..., 1::2]) if interleaved else (part[..., :half], part[..., half:])
        c, s = (each[:, None, ::2] if interleaved else each[:, None, :half] for each in (cos, sin))
        pair = first * c - second * s, second * c + first * s
        out = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return torch.cat([out, x[..., cos.shape[1] :]], -1)

    keys, values = keys.clone(), values.clone()
    for token, row in enumerate(rows.tolist()):
        keys[:, row], values[:, row] = turned(k, k_norm)[token], v[token]
    return [turned(q, q_norm), keys, values]


def outputs(run: Any, arguments: Arguments) -> list[Tensor]:
    keys, values = arguments["keys"].clone(), arguments["values"].clone()
    out = run(**arguments | {"keys": keys, "values": values})
    return [out.cpu(), keys.cpu(), values.cpu()]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_a_rotation_of_pairs(case: RopeCase, poison: None) -> None:
    arguments = case.draw()
    found = outputs(rope_kv_write, arguments)
    torch.testing.assert_close(found, plain(**arguments), equal_nan=True)
    untouched = [row for row in range(arguments["keys"].shape[1]) if row not in arguments["rows"].tolist()]
    assert all(each[:, untouched].isnan().all() for each in found[1:])


@pytest.mark.parametrize("wide", [False, True], ids=["one dtype", "float32 angles and norms"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_error_is_within_budget(case: RopeCase, wide: bool, target: Target, poison: None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = cast(case.draw(), dtype)
        if wide:
            small = {name: arguments[name].float() for name in ("cos", "sin", "q_norm", "k_norm") if name in arguments}
            arguments |= small
        found = outputs(target.run(dtype), cast_to(arguments, target.device))
        assert {each.dtype for each in found} == {dtype}
        exact = plain(**cast(arguments, torch.float64))
        rounded = [each.to(dtype) for each in plain(**cast(arguments, dtype))]
        assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(found, exact, strict=True))
        assert_within_budget(NAMES, *([x.nan_to_num() for x in each] for each in (found, rounded, exact)))


def cast_to(arguments: Arguments, device: str) -> Arguments:
    return {name: each.to(device) if isinstance(each, Tensor) else each for name, each in arguments.items()}


def test_strides_do_not_matter(target: Target) -> None:
    arguments = cast(CASES["halves, norms"].draw(), torch.float32)
    expected = outputs(target.run(torch.float32), cast_to(arguments, target.device))
    strided = cast_to(arguments, target.device)
    strided |= {name: strided[name].contiguous() for name in "qk"}
    strided["v"] = strided["v"].transpose(0, 1).contiguous().transpose(0, 1)
    keys, values = (strided[name].transpose(0, 1).contiguous() for name in ("keys", "values"))  # [R, Hkv, Dh]
    cache = {"keys": keys.transpose(0, 1), "values": values.transpose(0, 1)}
    out = target.run(torch.float32)(**strided | cache)
    found = [each.cpu() for each in (out, cache["keys"], cache["values"])]
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
