"""The clock and the ceilings, without a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import device
from benchmarks.device import Ceilings, ceilings, clock, event_timed, free_bytes, slug


def test_events_enclose_the_call_and_not_the_flush():
    now, trace = [0.0], []

    class Event:
        def record(self) -> None:
            self.at = now[0]
            trace.append("record")

        def synchronize(self) -> None:
            trace.append("synchronize")

        def elapsed_time(self, other: Any) -> float:
            return other.at - self.at

    def spend(name: str, milliseconds: float) -> None:
        now[0] += milliseconds
        trace.append(name)

    arm = event_timed(lambda: spend("call", 8.0), Event, lambda: spend("flush", 100.0))
    assert [arm(), arm()] == pytest.approx([0.008, 0.008])
    assert trace[:5] == ["flush", "record", "call", "record", "synchronize"]


SHARES = {"by arithmetic": (8 * 10**12, 10**9, 0.4), "by bytes": (10**9, 3 * 10**12, 0.75), "nothing": (0, 0, 0.0)}


@pytest.mark.parametrize(("flops", "moved", "share"), SHARES.values(), ids=SHARES.keys())
def test_share_is_the_larger_of_the_two_least_times(flops: int, moved: int, share: float):
    # 10 TFLOP/s, 2 TB/s, 2 s taken
    assert Ceilings(2000.0, 10.0).share(2.0, flops, moved) == pytest.approx(share)


def test_ceilings_count_bytes_read_and_written_and_two_flops_a_product(monkeypatch: Any):
    calls = []

    def clocked(function: Any, where: str) -> Any:
        return lambda: calls.append((function, where)) or 0.5

    monkeypatch.setattr(device, "clock", clocked)
    bounds = ceilings("cpu", torch.bfloat16, rounds=3)
    assert bounds.copy_gb_s == pytest.approx(2 * 2**28 / 0.5 / 1e9)
    assert bounds.matmul_tflop_s == pytest.approx(2 * 2048**3 / 0.5 / 1e12)
    assert len(calls) == 8  # one warm-up each


def test_clock_on_a_cpu_counts_the_call():
    assert 0 < clock(lambda: sum(range(1000)), "cpu")() < 5


def test_slug_names_the_device(monkeypatch: Any):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert (slug("cpu"), slug("cuda")) == ("cpu", "nvidia-h100-80gb-hbm3")


def test_free_memory_on_a_gpu_counts_what_the_allocator_holds_back(monkeypatch: Any):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100, 500))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 30)
    assert free_bytes("cuda") == 140
    assert 2**20 < free_bytes("cpu") < 2**50
