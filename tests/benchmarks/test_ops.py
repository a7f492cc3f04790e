"""Op cases: every arm agrees with its oracle or is refused; operations and bytes are those of the shape."""

from dataclasses import replace

import pytest
import torch

from benchmarks import ops
from benchmarks.harness import CheckFailed
from benchmarks.op_calls import FLOOR, Call, Problem, Unavailable
from benchmarks.ops import BUILDERS, CASES, Case, cases, measure, prepared
from vlmr1_kernels import registry


@pytest.mark.parametrize("case", cases("tiny"), ids=str)
def test_every_implementation_that_runs_here_agrees_and_keeps_its_samples(case: Case):
    known = registry.implementations(case.op)
    result = measure(case, "cpu", names=[FLOOR, *known, "eager"], rounds=2)
    assert {"floor", "reference", "eager"} <= result["arms"].keys()
    assert result["arms"].keys() | result["skipped"].keys() == {FLOOR, *known, "eager"}
    for name, row in result["arms"].items():
        assert len(row["seconds"]) == 2 and row["times_floor"] > 0 and bool(row["errors"]) == (name != FLOOR)
    assert all("runs on cuda" in reason for reason in result["skipped"].values())


def test_every_op_has_cases_for_every_device():
    assert BUILDERS.keys() == set(registry.ops())
    for device, names in CASES.items():
        found = cases(device)
        assert {case.op for case in found} == BUILDERS.keys(), device
        assert [str(case) for case in found] == names.split() and len({*found}) == len(found)


COUNTS = {  # operations and bytes by hand
    Case("linear_grpo_loss", (16, 4, 32), mode="trainable"): (3 * 2 * 16 * 4 * 32, 4 * 2 * (16 * 4 + 32 * 4)),
    Case("linear_grpo_loss", (16, 4, 32), mode="frozen"): (2 * 2 * 16 * 4 * 32, 4 * (2 * 16 * 4 + 32 * 4)),
    Case("linear_logprob", (16, 4, 32), "bfloat16", "no_grad"): (2 * 16 * 4 * 32, 2 * (16 * 4 + 32 * 4)),
    Case("grpo_loss", (16, 8)): (0, 16 * (3 * 4 + 4 + 8) + 8 * 4),
    Case("group_advantages", (16, 8)): (0, 2 * 4 * 16),
    # 3 pairs in the prompt; two branches of 3 rows see the 2 of the prompt and 6 pairs of their own
    Case("shared_prefix_attention", (1, 2, 2, 3, 2, 1, 16)): (7 * 2 * 2 * 16 * 27, 4 * 4 * 3 * 8 * 16),
    Case("varlen_attention", (2, 3, 2, 1, 16)): (7 * 2 * 2 * 16 * 18, 4 * 4 * 3 * 6 * 16),
    Case("sample_tokens", (4, 32)): (0, 4 * (32 * 4 + 8 + 8 + 4 + 4)),
    Case("shared_prefix_decode", (1, 2, 5, 3, 2, 1, 16)): (4 * 2 * 16 * 2 * 8, 4 * 16 * (2 * 11 + 2 * 2 * 2)),
    Case("rope_kv_write", (3, 2, 1, 16)): (0, 4 * 3 * 16 * (2 * 4 + 2)),
}


@pytest.mark.parametrize(("case", "counts"), COUNTS.items(), ids=map(str, COUNTS))
def test_operations_and_bytes(case: Case, counts: tuple[int, int]):
    problem = case.problem("cpu")
    assert (problem.flops, problem.moved) == counts


def disagreeing(peer: bool) -> Problem:
    right = {"out": torch.ones(3)}
    arms = {"a": lambda: Call(lambda: {"out": torch.tensor([1.0, 1.0, 1.1])}, 1e-2)}
    return Problem(0, 0, lambda: right, arms, frozenset({"a"} if peer else ()))


def test_an_implementation_that_disagrees_is_not_timed():
    problem = disagreeing(peer=False)
    with pytest.raises(CheckFailed, match="a: out errs by"):
        prepared(problem, "a", problem.oracle())
    with pytest.raises(CheckFailed, match="the oracle"):
        prepared(problem, "a", {"other": torch.ones(3)})


def failing(error: Exception) -> Call:
    raise error


def test_a_peer_that_disagrees_fails_or_is_absent_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    problem = disagreeing(peer=True)
    fails = {"fails": lambda: failing(AttributeError("no such kernel")), "absent": lambda: failing(ImportError("gone"))}
    arms = {**problem.arms, **fails, "right": lambda: Call(problem.oracle, 0.0)}
    problem = replace(problem, arms=arms, peers=frozenset(arms))
    for name, reason in (("a", "errs by"), ("fails", "no such kernel"), ("absent", "gone")):
        with pytest.raises(Unavailable, match=reason):
            prepared(problem, name, problem.oracle())
    monkeypatch.setitem(ops.BUILDERS, "grpo_loss", lambda *_, **__: problem)
    result = measure(Case("grpo_loss", (8, 8)), "cpu", rounds=3)
    assert result["skipped"].keys() == {"a", "fails", "absent"} and len(result["arms"]["right"]["seconds"]) == 3
    with pytest.raises(AttributeError):  # one of ours would be a fault
        prepared(replace(problem, peers=frozenset()), "fails", problem.oracle())
