"""Arms that disagree are not timed, peers that fail are left out, and the memory of a call is what it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import compare
from benchmarks.compare import Arm, Unavailable
from benchmarks.device import Ceilings
from benchmarks.harness import CheckFailed
from tests.resident import resident
from vlmr1_kernels import ImplementationError

MIB = 2**20
ORACLE = {"loss": torch.tensor(2.0), "d_hidden": torch.tensor([3.0, 4.0])}


class Fake:
    """A problem whose arms are given."""

    device, dtype, flops, moved, accumulator = "cpu", torch.float32, 4 * 10**9, 10**9, 3 * MIB

    def __init__(self, **arms: Arm):
        self._arms: Mapping[str, Callable[[], Arm]] = {name: lambda arm=arm: arm for name, arm in arms.items()}

    def arms(self) -> Mapping[str, Callable[[], Arm]]:
        return self._arms

    def oracle(self) -> compare.Outputs:
        return ORACLE

    def tiny(self) -> Fake:
        return self


def returns(loss: float, *d_hidden: float) -> Callable[[], compare.Outputs]:
    return lambda: {"loss": torch.tensor(loss), "d_hidden": torch.tensor(d_hidden)}


def raises(error: Exception) -> Callable[[], compare.Outputs]:
    def run() -> compare.Outputs:
        raise error

    return run


RIGHT = Arm(returns(2.0, 3.0, 4.0), 1e-6)


def test_error_of_each_result_is_relative_to_the_oracle():
    arm = Arm(returns(2.002, 3.0, 4.05), 0.02)
    _, errors, _ = compare.checked(Fake(ours=arm), ["ours"], ORACLE)
    assert errors["ours"] == pytest.approx({"loss": 1e-3, "d_hidden": 1e-2}, rel=1e-3)


WRONG = {
    "loss": (returns(2.1, 3.0, 4.0), "loss errs by 5.0e-02"),
    "gradient": (returns(2.0, 4.0, 3.0), "d_hidden errs by 2.8e-01"),
    "nan": (returns(2.0, float("nan"), 4.0), "d_hidden errs by nan"),
    "another result": (lambda: {"loss": torch.tensor(2.0)}, "returns"),
}


@pytest.mark.parametrize(("run", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_arm_is_an_error(run: Any, message: str):
    with pytest.raises(CheckFailed, match=message):
        compare.checked(Fake(right=RIGHT, wrong=Arm(run, 1e-2)), ["right", "wrong"], ORACLE)


LEFT_OUT = {
    "refusal": (Arm(raises(ImplementationError("refuses: no"))), "refuses: no"),
    "wrong peer": (Arm(returns(2.1, 3.0, 4.0), 1e-2, peer=True), "loss errs by 5.0e-02, more than 1e-02: not timed"),
    "failing peer": (Arm(raises(RuntimeError("no kernel\nlong story")), peer=True), "fails: RuntimeError: no kernel"),
    "too large": (replace(RIGHT, needs=2**60), "needs 1099511627776 MiB"),
}


@pytest.mark.parametrize(("arm", "reason"), LEFT_OUT.values(), ids=LEFT_OUT.keys())
def test_an_arm_that_cannot_run_is_left_out_with_the_reason(arm: Arm, reason: str):
    arms, _, skipped = compare.checked(Fake(right=RIGHT, other=arm), ["right", "other"], ORACLE)
    assert list(arms) == ["right"]
    assert reason in skipped["other"]


def test_our_own_failures_are_not_swallowed():
    with pytest.raises(RuntimeError, match="a bug"):
        compare.checked(Fake(ours=Arm(raises(RuntimeError("a bug")))), ["ours"], ORACLE)


def test_an_arm_that_cannot_be_imported_says_so():
    class Absent(Fake):
        def arms(self) -> Mapping[str, Callable[[], Arm]]:
            return {"peer": lambda: __import__("no_such_package")}

    with pytest.raises(Unavailable, match="No module named 'no_such_package'"):
        compare.build(Absent(), "peer")


def test_an_unknown_arm_is_named():
    with pytest.raises(ValueError, match="arm is 'our'; known: ours"):
        compare.build(Fake(ours=RIGHT), "our")


def test_extra_memory_is_the_peak_beyond_the_results():
    def run() -> compare.Outputs:
        with resident(112):
            return {"sum": torch.empty(48 * MIB // 4)}  # its pages are not written

    assert 60 < compare.extra_mib(Arm(run)) < 72


def test_figures():
    seconds = {"floor": [1.0, 1.0, 1.0], "eager": [2.0, 4.0, 3.0], "ours": [1.5, 1.5, 1.5]}
    rows = compare.figures(
        Fake(), seconds, {"ours": {"loss": 0.1}}, {"eager": "slow"}, {"eager": 40.0, "ours": 10.0}, Ceilings(2.0, 0.005)
    )
    assert rows["eager"]["median_ms"] == 3000 and rows["eager"]["note"] == "slow"
    assert (rows["eager"]["p20_ms"], rows["eager"]["p80_ms"]) == pytest.approx((2400, 3600))
    assert rows["ours"]["time/floor"] == {"value": 1.5, "low": 1.5, "high": 1.5}
    # 4 GFLOP at 5 GFLOP/s take 0.8 s, 1 GB at 2 GB/s takes 0.5 s
    assert rows["floor"]["ceiling_share"] == pytest.approx(0.8)
    assert rows["floor"]["gb_s"] == 1.0 and rows["floor"]["tflop_s"] == pytest.approx(0.004)
    assert rows["ours"]["extra/eager"] == 0.25 and rows["ours"]["extra_beyond_accumulator_mib"] == 7.0
    assert rows["ours"]["errors"] == {"loss": 0.1} and "extra_mib" not in rows["floor"]
