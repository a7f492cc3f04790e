from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import Case, Target, check_budget, grid, targets
from vlmr1_kernels import GRPOSettings, linear_logprob
from vlmr1_kernels.testing import (
    HEAD,
    Inputs,
    Problem,
    assert_within_budget,
    cast,
    eager_logprob,
    gradients,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("poison")

TINY_CHUNK = 1e-6  # MiB: one row at a time
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
    "logits to 80": Case((32,), 64, 300, spread=20.0, dtypes=HALVES),
    "softcap": Case((16,), 64, 500, spread=20.0, bias=True, softcap=30.0, dtypes=HALVES),
    "softcap, cold": Case((16,), 64, 500, COLD, softcap=2.0),
}
SMALL = Case((6,), 12, 23, HOT, bias=True, softcap=30.0)
NAMES = ("logp", "entropy", "d_hidden", "d_weight", "d_bias")


def head(inputs: Inputs) -> Inputs:
    return {name: inputs[name] for name in (*HEAD, "targets") if name in inputs}


def options(problem: Problem) -> dict[str, Any]:
    chunk = {"chunk_mib": problem.chunk_mib} if isinstance(problem, Case) else {}
    return {"temperature": problem.settings.temperature, "softcap": problem.softcap, **chunk}


def eager_outputs(inputs: Inputs, problem: Problem) -> tuple[Tensor, Tensor]:
    return eager_logprob(**head(inputs), temperature=problem.settings.temperature, softcap=problem.softcap)


def mixed(outputs: tuple[Tensor, Tensor], inputs: Inputs) -> list[Tensor]:
    """logp, entropy, and the gradients of a fixed mix of both."""
    logp, entropy = outputs
    mix = torch.linspace(-1, 2, len(logp), dtype=torch.float64, device=logp.device).to(logp.dtype)
    return [logp, entropy, *gradients((mix * logp).sum() + (mix.flip(0) * entropy).sum(), inputs)]


def eager(inputs: Inputs, problem: Problem) -> list[Tensor]:
    return mixed(eager_outputs(inputs, problem), inputs)


def test_the_cases_cover_the_sizes() -> None:
    assert {1, 7, 128, 1000} <= {case.rows for case in CASES.values()}
    assert {64, 200, 2048} <= {case.dim for case in CASES.values()}
    assert {32, 1000, 8193, 151_936} <= {case.vocab for case in CASES.values()}


@pytest.mark.parametrize(("target", "case", "dtype"), grid("linear_logprob", CASES))
def test_error_is_within_budget(target: Target, case: Case, dtype: torch.dtype) -> None:
    run = target.run(dtype)

    def ours(inputs: Inputs, problem: Problem) -> list[Tensor]:
        values = mixed(run(**head(inputs), entropy=True, **options(case)), inputs)
        assert [value.dtype for value in values] == [torch.float32] * 2 + [dtype] * (len(values) - 2)
        return values

    check_budget(NAMES, ours, eager, target, case, dtype)


def eager_by_logp(inputs: Inputs, problem: Problem) -> list[Tensor]:
    return gradients(eager_outputs(inputs, problem)[0].square().sum(), inputs)


def eager_by_entropy(inputs: Inputs, problem: Problem) -> list[Tensor]:
    return gradients(eager_outputs(inputs, problem)[1].square().sum(), inputs)


@pytest.mark.parametrize("target", targets("linear_logprob"))
def test_the_gradient_through_each_output_alone(target: Target) -> None:
    run = target.run(torch.float32)

    def by_logp(inputs: Inputs, problem: Problem) -> list[Tensor]:
        return gradients(run(**head(inputs), **options(problem)).square().sum(), inputs)

    def by_entropy(inputs: Inputs, problem: Problem) -> list[Tensor]:
        return gradients(run(**head(inputs), entropy=True, **options(problem))[1].square().sum(), inputs)

    case = Case((9,), 40, 77, HOT, bias=True, softcap=30.0)
    check_budget(NAMES[2:], by_logp, eager_by_logp, target, case, torch.float32)
    check_budget(NAMES[2:], by_entropy, eager_by_entropy, target, case, torch.float32)


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")], ids="+".join)
@pytest.mark.parametrize("target", targets("linear_logprob"))
def test_only_what_is_trained_gets_a_gradient(target: Target, trained: tuple[str, ...]) -> None:
    run, inputs = target.run(torch.float32), cast(SMALL.draw(0, torch.float32), torch.float32, target.device)
    all_gradients = gradients(run(**head(inputs), **options(SMALL)).sum(), inputs)
    expected = dict(zip(HEAD, all_gradients, strict=True))
    for name in set(HEAD) - set(trained):
        inputs[name].requires_grad_(False)
    run(**head(inputs), **options(SMALL)).sum().backward()
    for name in HEAD:
        if name in trained:
            torch.testing.assert_close(inputs[name].grad, expected[name])
        else:
            assert inputs[name].grad is None


def eager_tied(inputs: Inputs, problem: Problem) -> list[Tensor]:
    embedding = inputs["weight"]
    logp, entropy = eager_logprob(torch.tanh(embedding[inputs["targets"].flip(0)]), embedding, inputs["targets"])
    return list(torch.autograd.grad((logp + entropy).square().sum(), embedding))


@pytest.mark.parametrize("target", targets("linear_logprob"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_gradients_of_a_tied_weight_add_up(target: Target, dtype: torch.dtype) -> None:
    run = target.run(dtype)

    def ours(inputs: Inputs, problem: Problem) -> list[Tensor]:
        embedding = inputs["weight"]
        hidden = torch.tanh(embedding[inputs["targets"].flip(0)])
        logp, entropy = run(hidden, embedding, inputs["targets"], entropy=True)
        return list(torch.autograd.grad((logp + entropy).square().sum(), embedding))

    check_budget(("d_weight",), ours, eager_tied, target, Case((20,), 24, 50), dtype)


@pytest.mark.parametrize("target", targets("linear_logprob"))
def test_bfloat16_gradients_do_not_get_worse_with_the_number_of_chunks(target: Target) -> None:
    run, case = target.run(torch.bfloat16), Case((90,), 16, 20)
    drawn = case.draw(0, torch.bfloat16)
    drawn["hidden"] = drawn["hidden"].abs()  # one sign: a sum in bfloat16 would stop growing
    exact = eager(cast(drawn, torch.float64), case)
    plain = eager(cast(drawn, torch.bfloat16, target.device), case)

    def by_chunks(chunk_mib: float) -> list[Tensor]:
        inputs = cast(drawn, torch.bfloat16, target.device)
        return mixed(run(**head(inputs), entropy=True, chunk_mib=chunk_mib), inputs)

    one, many = by_chunks(100.0), by_chunks(3 * 20 * 4 / 2**20)
    assert_within_budget(NAMES[:4], [v.cpu() for v in many], [v.cpu() for v in plain], exact)
    assert relative_error(many[3].cpu(), exact[3]) <= 1.1 * relative_error(one[3].cpu(), exact[3])


@pytest.mark.parametrize("target", targets("linear_logprob", slow=True))
def test_more_rows_than_a_grid_dimension_holds(target: Target) -> None:
    def ours(inputs: Inputs, problem: Problem) -> list[Tensor]:
        return mixed(target.run(torch.float32)(**head(inputs), entropy=True), inputs)

    check_budget(NAMES, ours, eager, target, Case((70_001,), 3, 5, draws=1), torch.float32)


@pytest.mark.parametrize("target", targets("linear_logprob"))
def test_layout_and_integer_type_of_the_inputs_do_not_matter(target: Target) -> None:
    run, drawn = target.run(torch.float32), SMALL.draw(0, torch.float32)

    def outputs(change: bool) -> list[Any]:
        inputs = cast(drawn, torch.float32, target.device)
        given = head(inputs)
        if change:
            given["hidden"] = inputs["hidden"].T.contiguous().T
            given["weight"] = torch.cat([inputs["weight"]] * 2, dim=1)[:, : SMALL.dim]
            given["bias"] = inputs["bias"].repeat_interleave(2)[::2]
            given["targets"] = inputs["targets"].int().repeat_interleave(3)[::3]
        logp, entropy = run(**given, entropy=True, **options(SMALL))
        (logp * entropy).sum().expand(3).sum().backward()
        return [logp, entropy, *(leaf.grad for leaf in (inputs["hidden"], inputs["weight"], inputs["bias"]))]

    for value, expected in zip(outputs(True), outputs(False), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("target", targets("linear_logprob"))
def test_backward_can_be_repeated_and_follows_the_factor(target: Target) -> None:
    run, inputs = target.run(torch.float32), cast(SMALL.draw(0, torch.float32), torch.float32, target.device)
    leaves = [inputs[name] for name in HEAD]
    loss = (run(**head(inputs), **options(SMALL)) * torch.arange(6, device=target.device)).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [value.clone() for value in first]
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    threefold = torch.autograd.grad(3 * loss, leaves)
    run(**head(inputs), **options(SMALL)).sum().backward()
    for index, expected in enumerate(kept):
        assert torch.equal(first[index], expected), "a later call changed a gradient that was kept"
        assert torch.equal(second[index], expected)
        torch.testing.assert_close(threefold[index], 3 * expected)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("entropy", [False, True], ids=["logp", "logp and entropy"])
def test_gradcheck(entropy: bool, softcap: float | None) -> None:
    inputs = cast(Problem((5,), 3, 7, bias=True).draw(0, torch.float64), torch.float64)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        settings: dict[str, Any] = {"temperature": 0.7, "softcap": softcap, "chunk_mib": TINY_CHUNK}
        return linear_logprob(hidden, weight, inputs["targets"], bias=bias, entropy=entropy, **settings)

    assert torch.autograd.gradcheck(function, [inputs[name] for name in HEAD])


@pytest.mark.parametrize("target", targets("linear_logprob"))
def test_no_rows(target: Target) -> None:
    inputs = cast(Problem((0,), 4, 6).draw(0, torch.float32), torch.float32, target.device)
    values = mixed(target.run(torch.float32)(**head(inputs), entropy=True), inputs)
    assert [value.shape for value in values] == [(0,), (0,), (0, 4), (6, 4)]
    assert values[3].abs().max() == 0


@pytest.mark.parametrize("target", targets("linear_logprob"))
def test_autocast_does_not_narrow_the_op(target: Target) -> None:
    run, inputs = target.run(torch.float32), cast(SMALL.draw(0, torch.float32), torch.float32, target.device)
    expected, _ = run(**head(inputs), entropy=True)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        value, _ = run(**head(inputs), entropy=True)
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
        ({"weight": torch.zeros(7, 5, device="meta")}, "weight is on meta, hidden is on cpu"),
        ({"hidden": torch.zeros(3, 5, dtype=torch.int64)}, "hidden must be float64, float32"),
        ({"targets": torch.zeros(2, dtype=torch.long)}, r"targets must be \[3\], it is \[2\]"),
        ({"targets": torch.zeros(3)}, "targets must be int64 or int32"),
        ({"targets": torch.zeros(3, dtype=torch.long, device="meta")}, "targets is on meta"),
        ({"bias": torch.zeros(5)}, r"bias must be \[7\]"),
        ({"bias": torch.zeros(7, dtype=torch.float16)}, "bias is torch.float16, hidden is torch.float32"),
        ({"bias": torch.zeros(7, device="meta")}, "bias is on meta, hidden is on cpu"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"chunk_mib": 0}, "chunk_mib must be above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    good = {
        "hidden": torch.zeros(3, 5),
        "weight": torch.zeros(7, 5),
        "targets": torch.zeros(3, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob(**{**good, **change})
