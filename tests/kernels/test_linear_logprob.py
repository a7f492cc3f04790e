from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmr1_kernels import linear_logprob
from vlmr1_kernels.testing import assert_within_budget, eager_logprob, pooled

TINY_CHUNK = 1e-6  # MiB: one row at a time
Arguments = dict[str, Any]


def problem(rows: int, dim: int, vocab: int, spread: float = 1.0, bias: bool = False) -> Arguments:
    """Logits of about `spread` times a normal, float64."""
    inputs: Arguments = {
        "hidden": torch.randn(rows, dim, dtype=torch.float64),
        "weight": spread * dim**-0.5 * torch.randn(vocab, dim, dtype=torch.float64),
        "targets": torch.randint(0, vocab, (rows,)),
    }
    if bias:
        inputs["bias"] = torch.randn(vocab, dtype=torch.float64)
    return inputs


def rounded(inputs: Arguments, dtype: torch.dtype) -> Arguments:
    """float64 again, with values that `dtype` holds exactly."""
    return {name: value.to(dtype).double() if value.is_floating_point() else value for name, value in inputs.items()}


def with_gradients(function: Callable[..., Any], inputs: Arguments, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """logp, entropy, and the gradients of a fixed mix of both with respect to hidden, weight and bias."""
    cast = {
        name: value.to(dtype).detach().requires_grad_() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    logp, entropy = function(**cast, **options)
    mix = torch.linspace(-1, 2, len(logp), dtype=torch.float64).to(logp.dtype)
    loss = (mix * logp).sum() + (mix.flip(0) * entropy).sum()
    leaves = [value for name, value in cast.items() if name != "targets"]
    return [logp, entropy, *torch.autograd.grad(loss, leaves)]


NAMES = ("logp", "entropy", "d_hidden", "d_weight", "d_bias")
CASES: dict[str, tuple[Arguments, Arguments]] = {
    "one row": ({"rows": 1, "dim": 64, "vocab": 32}, {}),
    # Chunks of 5, 5 and 4 rows: MKL's GEMM for 3 rows and less errs twice as much as the one for more.
    "odd sizes, several chunks": ({"rows": 14, "dim": 65, "vocab": 1001}, {"chunk_mib": 0.0195}),
    "row by row": ({"rows": 5, "dim": 33, "vocab": 129}, {"chunk_mib": TINY_CHUNK}),
    "default chunks": ({"rows": 300, "dim": 64, "vocab": 8193}, {}),
    "wide head": ({"rows": 3, "dim": 16, "vocab": 151_936}, {}),
    "bias": ({"rows": 9, "dim": 40, "vocab": 77, "bias": True}, {"chunk_mib": 0.001}),
    "cold": ({"rows": 9, "dim": 40, "vocab": 77, "bias": True}, {"temperature": 0.3}),
    "hot": ({"rows": 9, "dim": 40, "vocab": 77}, {"temperature": 1.7}),
    "logits to 80": ({"rows": 64, "dim": 64, "vocab": 500, "spread": 20.0}, {}),
    "softcap": ({"rows": 16, "dim": 64, "vocab": 500, "spread": 20.0, "bias": True}, {"softcap": 30.0}),
    "softcap, cold": ({"rows": 16, "dim": 64, "vocab": 500}, {"softcap": 2.0, "temperature": 0.3}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "options"), CASES.values(), ids=CASES.keys())
def test_error_is_within_budget(shape: Arguments, options: Arguments, dtype: torch.dtype) -> None:
    problems = [rounded(problem(**shape), dtype) for _ in range(6)]
    plain = {name: value for name, value in options.items() if name != "chunk_mib"}
    ours = [with_gradients(linear_logprob, inputs, dtype, entropy=True, **options) for inputs in problems]
    assert [value.dtype for value in ours[0]] == [torch.float32] * 2 + [dtype] * (len(ours[0]) - 2)
    assert_within_budget(
        NAMES[: len(ours[0])],
        pooled(ours),
        pooled(with_gradients(eager_logprob, inputs, dtype, **plain) for inputs in problems),
        pooled(with_gradients(eager_logprob, inputs, torch.float64, **plain) for inputs in problems),
    )


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "logp and entropy"])
def test_gradcheck(entropy: bool, softcap: float | None) -> None:
    inputs = problem(5, 3, 7, bias=True)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear_logprob(
            hidden,
            weight,
            inputs["targets"],
            bias=bias,
            temperature=0.7,
            softcap=softcap,
            entropy=entropy,
            chunk_mib=TINY_CHUNK,
        )

    assert torch.autograd.gradcheck(function, leaves)


def test_no_rows() -> None:
    inputs = problem(0, 4, 6)
    ours = with_gradients(linear_logprob, inputs, torch.float32, entropy=True)
    assert [value.shape for value in ours] == [(0,), (0,), (0, 4), (6, 4)]
    assert ours[3].abs().max() == 0


def test_a_frozen_head_gets_no_gradient_and_one_output_is_enough() -> None:
    inputs = problem(6, 5, 9)
    hidden = inputs["hidden"].requires_grad_()
    logp: Any = linear_logprob(hidden, inputs["weight"], inputs["targets"], chunk_mib=TINY_CHUNK)
    expected = torch.autograd.grad(eager_logprob(hidden, inputs["weight"], inputs["targets"])[0].sum(), hidden)[0]
    logp.sum().backward()
    assert inputs["weight"].grad is None
    torch.testing.assert_close(hidden.grad, expected)


def test_autocast_does_not_narrow_the_op() -> None:
    inputs = {name: v.float() if v.is_floating_point() else v for name, v in problem(6, 50, 90).items()}
    expected, _ = linear_logprob(**inputs, entropy=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = linear_logprob(**inputs, entropy=True)
    assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden must be \[N, D\], it is \[3\]"),
        ({"weight": torch.zeros(7, 4)}, r"weight must be \[V, 5\], it is \[7, 4\]"),
        (
            {"weight": torch.zeros(7, 5, dtype=torch.bfloat16)},
            "weight is torch.bfloat16, hidden is torch.float32",
        ),
        ({"hidden": torch.zeros(3, 5, dtype=torch.int64)}, "hidden must be float64, float32"),
        ({"targets": torch.zeros(2, dtype=torch.long)}, r"targets must be \[3\], it is \[2\]"),
        ({"targets": torch.zeros(3)}, "targets must be int64 or int32"),
        ({"targets": torch.zeros(3, dtype=torch.long, device="meta")}, "targets is on meta"),
        ({"bias": torch.zeros(5)}, r"bias must be \[7\]"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"chunk_mib": 0}, "chunk_mib must be above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(change: Arguments, message: str) -> None:
    good = {
        "hidden": torch.zeros(3, 5),
        "weight": torch.zeros(7, 5),
        "targets": torch.zeros(3, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**good, **change})
