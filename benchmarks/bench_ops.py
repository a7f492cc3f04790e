"""The op cases as pytest-benchmark tests, on CPU: `make bench-ops`. Each arm is checked before it is timed."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

from benchmarks.op_calls import FLOOR, Outputs, Problem, Unavailable
from benchmarks.ops import Case, cases, peak_mib, prepared
from vlmr1_kernels import registry

PEERS = {"linear_grpo_loss": ("trl", "liger"), "linear_logprob": ("trl",)}
ARMS = [
    (case, arm)
    for case in cases("cpu")
    for arm in (FLOOR, *registry.implementations(case.op), "eager", *PEERS.get(case.op, ()))
]
ROUNDS = 7


@lru_cache(maxsize=1)  # the arms of a case follow each other
def _problem(case: Case) -> tuple[Problem, Outputs]:
    problem = case.problem("cpu")
    return problem, problem.oracle()


@pytest.mark.parametrize(("case", "arm"), ARMS, ids=[f"{case}-{arm}" for case, arm in ARMS])
def test_op(benchmark: Any, case: Case, arm: str) -> None:
    problem, oracle = _problem(case)
    try:
        call, errors = prepared(problem, arm, oracle)
    except Unavailable as error:
        pytest.skip(str(error))
    benchmark.group = str(case)
    benchmark.extra_info.update(errors=errors, peak_mib=peak_mib(call), flops=problem.flops, bytes=problem.moved)
    benchmark.pedantic(call.run, rounds=ROUNDS, warmup_rounds=1)
