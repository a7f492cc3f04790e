from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_cases import TINY_CHUNK, Case, Target, check_budget, grid, head_of, targets
from vlmr1_kernels import GRPOSettings, linear_logprob
from vlmr1_kernels.linear import chunk_rows
from vlmr1_kernels.testing import HEAD, Inputs, Problem, cast, eager_logprob, gradients

OP = "linear_logprob"
pytestmark = pytest.mark.usefixtures("poison")

COLD, HOT = GRPOSettings(temperature=0.3), GRPOSettings(temperature=1.7)
HALVES = (torch.float32, torch.bfloat16, torch.float16)

CASES: dict[str, Case] = {
    "one row": Case((1,), 64, 32, draws=6, dtypes=HALVES),
    # Chunks of 5, 5 and 4 rows: MKL's GEMM for 3 rows and less errs twice as much as the one for more.
    "odd sizes, several chunks": Case((14,), 65, 1001, chunk_mib=0.0195, draws=6),
    "row by row": Case((5,), 33, 129, chunk_mib=TINY_CHUNK, draws=6),
    "7 rows, odd width": Case((7,), 200, 1000, dtypes=HALVES),
    "128 rows": Case((128,), 64, 8193, draws=2),
    "1000 rows": Case((1000,), 64, 1000, draws=1),
    "2048 wide": Case((7,), 2048, 1000),
    "wide head": Case((3,), 16, 151_936),
    "bias": Case((9,), 40, 77, bias=True, chunk_mib=0.001, draws=6),
    "cold": Case((9,), 40, 77, COLD, bias=True, draws=6),
    "hot": Case((9,), 40, 77, HOT, draws=6),
    "logits to 80": Case((15,), 64, 300, spread=20.0, dtypes=HALVES),
    "softcap": Case((16,), 64, 300, spread=20.0, bias=True, softcap=30.0, dtypes=HALVES),
    "softcap, cold": Case((16,), 64, 300, COLD, softcap=2.0),
}
SMALL = Case((6,), 12, 23, HOT, bias=True, softcap=30.0)
NAMES = ("logp", "entropy", "d_hidden", "d_weight", "d_bias")


def options(case: Case) -> dict[str, Any]:
    return {"temperature": case.settings.temperature, "softcap": case.softcap, "chunk_mib": case.chunk_mib}


def eager_outputs(inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor]:
    return eager_logprob(**head_of(inputs), temperature=problem.settings.temperature, softcap=problem.softcap)


def mixed(outputs: tuple[Tensor, Tensor], inputs: Inputs) -> list[Tensor]:
    """logp, entropy, and the gradients of a fixed mix of both."""
    logp, entropy = outputs
    mix = torch.linspace(-1, 2, len(logp), dtype=torch.float64, device=logp.device).to(logp.dtype)
    return [logp, entropy, *gradients((mix * logp).sum() + (mix.flip(0) * entropy).sum(), inputs)]


def eager(inputs: Inputs, problem: Problem) -> list[Tensor]:
    return mixed(eager_outputs(inputs, problem), inputs)


@pytest.mark.parametrize(("target", "case", "dtype"), grid(OP, CASES))
def test_error_is_within_budget(target: Target, case: Case, dtype: torch.dtype) -> None:
    run = target.run(dtype)

    def ours(inputs: Inputs, problem: Problem) -> list[Tensor]:
        values = mixed(run(**head_of(inputs), entropy=True, **options(case)), inputs)
        assert [value.dtype for value in values] == [torch.float32] * 2 + [dtype] * (len(values) - 2)
        return values

    check_budget(NAMES, ours, eager, target, case, dtype)


@pytest.mark.parametrize("output", [0, 1], ids=["logp", "entropy"])
def test_the_gradient_through_each_output_alone(target: Target, output: int) -> None:
    run, case = target.run(torch.float32), Case((9,), 40, 77, HOT, bias=True, softcap=30.0)

    def ours(inputs: Inputs, case: Case) -> list[Tensor]:
        found = run(**head_of(inputs), entropy=output == 1, **options(case))
        return gradients((found[1] if output == 1 else found).square().sum(), inputs)

    def expected(inputs: Inputs, case: Case) -> list[Tensor]:
        return gradients(eager_outputs(inputs, case)[output].square().sum(), inputs)

    check_budget(NAMES[2:], ours, expected, target, case, torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.9, 1.7])
@pytest.mark.parametrize("target", targets(OP, only=("native", "triton")))
def test_forbidden_tokens_have_no_part_in_anything(target: Target, temperature: float) -> None:
    inputs = cast(Problem((4,), 8, 90).draw(0, torch.float32), torch.float32, target.device)
    bias = torch.zeros(90, device=target.device)
    bias[30:] = -torch.inf
    wanted = inputs["targets"] % 30
    results = []
    for size in (90, 30):
        leaves = [inputs["hidden"], inputs["weight"][:size]]
        options: dict[str, Any] = {"bias": bias[:size], "entropy": True, "temperature": temperature}
        logp, entropy = target.run(torch.float32)(*leaves, wanted, **options)
        d_hidden, d_weight = torch.autograd.grad((logp + entropy).sum(), leaves)
        results.append([logp, entropy, d_hidden, d_weight[:30]])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", targets(OP, slow=True))
def test_more_rows_than_a_grid_dimension_holds(target: Target) -> None:
    def ours(inputs: Inputs, problem: Problem) -> list[Tensor]:
        return mixed(target.run(torch.float32)(**head_of(inputs), entropy=True), inputs)

    check_budget(NAMES, ours, eager, target, Case((70_001,), 3, 5, draws=1), torch.float32)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "logp and entropy"])
def test_gradcheck(entropy: bool, softcap: float | None) -> None:
    inputs = cast(Problem((5,), 3, 7, bias=True).draw(0, torch.float64), torch.float64)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        settings: dict[str, Any] = {"temperature": 0.7, "softcap": softcap, "chunk_mib": TINY_CHUNK}
        return linear_logprob(hidden, weight, inputs["targets"], bias=bias, entropy=entropy, **settings)

    assert torch.autograd.gradcheck(function, [inputs[name] for name in HEAD])


def test_no_rows(target: Target) -> None:
    inputs = cast(Problem((0,), 4, 6).draw(0, torch.float32), torch.float32, target.device)
    values = mixed(target.run(torch.float32)(**head_of(inputs), entropy=True), inputs)
    assert [value.shape for value in values] == [(0,), (0,), (0, 4), (6, 4)]
    assert values[3].abs().max() == 0


def test_autocast_does_not_narrow_the_op(target: Target) -> None:
    run, inputs = target.run(torch.float32), cast(SMALL.draw(0, torch.float32), torch.float32, target.device)
    expected, _ = run(**head_of(inputs), entropy=True)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        value, _ = run(**head_of(inputs), entropy=True)
    assert torch.equal(value, expected)


CHUNK_ROWS: dict[str, tuple[int, int, torch.dtype, float | None, int]] = {
    # rows, vocabulary, dtype, chunk_mib, rows of a chunk
    "eighth": (4096, 8192, torch.float32, None, 512),
    "wide logits": (4096, 8192, torch.bfloat16, None, 512),
    "at least 4 MiB": (256, 8192, torch.float32, None, 128),
    "small": (512, 500, torch.float32, None, 2098),
    "none": (0, 8192, torch.float32, None, 128),
    "bounded": (10**6, 151_936, torch.float32, None, 883),
    "MiB": (4096, 8192, torch.float32, 1.0, 32),
    "float64": (4096, 8192, torch.float64, 1.0, 16),
    "one row": (4096, 8192, torch.float32, 1e-6, 1),
}


@pytest.mark.parametrize(("rows", "vocabulary", "dtype", "chunk_mib", "expected"), CHUNK_ROWS.values(), ids=CHUNK_ROWS)
def test_chunk_rows(rows, vocabulary, dtype, chunk_mib, expected) -> None:
    hidden, weight = (torch.empty(each, 1, dtype=dtype) for each in (rows, vocabulary))
    assert chunk_rows(hidden, weight, chunk_mib) == (expected, expected)
