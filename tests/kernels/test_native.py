"""Tests of the native library alone: its instruction sets, its threads, its memory, and its absence."""

import resource
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.helpers.kernel_cases import Case, Target, check_budget, threads
from tests.helpers.python import python
from vlmr1_kernels import GRPOSettings, ImplementationError, group_advantages, linear_grpo_loss, linear_logprob, use
from vlmr1_kernels.implementations import Request
from vlmr1_kernels.native import library
from vlmr1_kernels.registry import explain
from vlmr1_kernels.testing import Inputs, Problem, cast, gradients

pytestmark = pytest.mark.skipif(library.unavailable_reason() is not None, reason=str(library.unavailable_reason()))

BACKENDS = ("baseline", "avx2", "avx512", "avx512bf16")
EVERYTHING = GRPOSettings(beta=0.1, entropy_coef=0.02, temperature=0.8)


@pytest.fixture(params=BACKENDS)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    if not library.library().vlmr1_use_backend(request.param.encode()):
        pytest.skip(f"this processor does not run {request.param}")
    yield
    library.library().vlmr1_use_backend(None)


def run(inputs: Inputs, problem: Problem, **options: object) -> list[Tensor]:
    loss, metrics = linear_grpo_loss(**inputs, softcap=problem.softcap, settings=problem.settings, **options)
    return [loss, metrics["logp"], metrics["entropy"], *gradients(loss, inputs)]


reference = partial(run, impl="reference")


PROBLEMS = {
    "odd sizes": Case((5, 1, 8), dim=67, vocab=1001, settings=EVERYTHING, bias=True),
    "probabilities kept": Case((30, 11), dim=130, vocab=2055),
    "softcap": Case((9, 4), dim=33, vocab=515, settings=EVERYTHING, softcap=30.0, spread=20.0),
    "vocabulary of one tile": Case((3, 2), dim=8, vocab=17),
}


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("case", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_every_instruction_set_is_within_budget(case: Case, dtype: torch.dtype) -> None:
    names, target = ("loss", "logp", "entropy", "d_hidden", "d_weight", "d_bias"), Target("", "native", "cpu")
    check_budget(names, partial(run, impl="native"), reference, target, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    problem = Problem((40, 60, 33), dim=96, vocab=3001, settings=EVERYTHING, bias=True)
    inputs, results = problem.draw(0, dtype), []
    for count in (1, 2, 5):
        with threads(count):
            results.append(run(cast(inputs, dtype), problem, impl="native", chunk_mib=0.8))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_masked_vocabulary_and_broken_logits(dtype: torch.dtype) -> None:
    problem = Problem((3, 3), dim=16, vocab=700, settings=EVERYTHING, bias=True)
    inputs = problem.draw(0, dtype)
    inputs["targets"] = inputs["targets"] % 100
    inputs["bias"][512:] = -torch.inf  # a whole block of logits, and part of the next
    inputs["bias"][300:310] = -torch.inf
    values = run(cast(inputs, dtype), problem, impl="native")
    allowed = inputs["bias"].isfinite()
    kept = {**inputs, "weight": inputs["weight"][allowed], "bias": inputs["bias"][allowed]}
    kept["targets"] = (allowed.cumsum(0) - 1)[inputs["targets"]]
    expected = reference(cast(kept, torch.float64), problem)
    torch.testing.assert_close(values[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(values[2].double(), expected[2], rtol=1e-5, atol=1e-5)
    assert all(value.isfinite().all() for value in values)
    assert values[4][~allowed].abs().max() < 1e-9
    for broken in (torch.nan, torch.inf):
        inputs["hidden"][1, 0] = broken
        logp, entropy = linear_logprob(
            *(cast(inputs, dtype)[name].detach() for name in ("hidden", "weight", "targets")),
            entropy=True,
            impl="native",
        )
        assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, True, False, False, False, False]


def test_targets_and_sequences_outside_their_range_touch_no_memory() -> None:
    problem = Problem((2, 2), dim=8, vocab=50)
    inputs = cast(problem.draw(0, torch.float32), torch.float32)
    inputs["targets"] = torch.tensor([0, -1, 50, 10**12])
    logp = linear_logprob(inputs["hidden"], inputs["weight"], inputs["targets"], impl="native")
    assert isinstance(logp, Tensor) and logp.isnan().tolist() == [False, True, True, True]
    inputs["seq_ids"] = torch.tensor([0, 0, 1, 2])
    with pytest.raises(ValueError, match=r"seq_ids must be in 0\.\.B-1"):
        linear_grpo_loss(**inputs, impl="native")


def test_without_the_library_auto_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "PATH", library.PATH.with_name("absent.so"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    library._unavailable_reason.cache_clear()
    try:
        for op in ("linear_logprob", "grpo_loss", "linear_grpo_loss", "group_advantages"):
            found = explain(op, Request(torch.device("cpu"), torch.float32, (8, 8)))
            assert found.chosen == "reference"
            assert found.others["native"].startswith("the native library is not built; it needs a C++ compiler")
        with use("group_advantages=native"), pytest.raises(ImplementationError, match="is not built"):
            group_advantages(torch.ones(4), 2)
    finally:
        library._unavailable_reason.cache_clear()


def test_a_workspace_that_does_not_fit_is_a_memory_error() -> None:
    problem = Problem((2, 2), dim=8, vocab=50)
    inputs = cast(problem.draw(0, torch.float32), torch.float32)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    weight = torch.zeros(2**22, 8)
    hidden = torch.zeros(2**8, 8, requires_grad=True)  # 4 GiB of logits
    rows = torch.zeros(2**8, dtype=torch.long)
    used = int(next(open("/proc/self/statm")).split()[0]) * resource.getpagesize()  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, hard))
    try:
        with pytest.raises(MemoryError, match="a smaller chunk_mib needs less"):
            linear_grpo_loss(hidden, weight, rows, rows, torch.ones(1), impl="native", chunk_mib=8192)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    loss, _ = linear_grpo_loss(**inputs, impl="native")
    assert loss.isfinite()


@pytest.mark.slow
def test_one_openmp_runtime() -> None:
    code = (
        "import torch; from vlmr1_kernels.native import library; library.library();"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'libomp' in line})"
    )
    done = python("-c", code, check=True)
    assert done.stdout.count("omp") <= 1, done.stdout
