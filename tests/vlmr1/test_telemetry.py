"""Seconds by phase, peak memory, and the GPUs that NVML reports."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from vlmr1.memory.telemetry import Gpu, Phases, gpu_info, peak_memory_mib

on_cpu = pytest.mark.skipif(torch.cuda.is_initialized(), reason="measures resident memory")


class NVMLError(Exception):
    pass


def fake_nvml(**changes):
    """NVML of a machine with two GPUs; memory in bytes."""
    memory = [SimpleNamespace(total=80 * 2**30, used=2**30), SimpleNamespace(total=24 * 2**30, used=0)]
    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.65",
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: ("A100", "L4")[handle],
        nvmlDeviceGetMemoryInfo=lambda handle: memory[handle],
    )
    return SimpleNamespace(**{**vars(nvml), **changes})


def test_phases_add_up(monkeypatch):
    clock = iter([10.0, 10.5, 20.0, 21.25, 30.0, 32.0])
    monkeypatch.setattr("vlmr1.memory.telemetry.perf_counter", lambda: next(clock))
    phases = Phases()
    for name in ("rollout", "policy", "rollout"):
        with phases(name):
            pass
    assert phases.seconds == {"rollout": 2.5, "policy": 1.25}


def test_a_phase_that_raises_is_counted():
    phases = Phases()
    with pytest.raises(KeyError, match="lost"), phases("reward"):
        time.sleep(0.02)
        raise KeyError("lost")
    assert 0.02 <= phases.seconds["reward"] < 2.0


@on_cpu
def test_peak_memory_grows_by_what_is_allocated():
    before = peak_memory_mib()
    block = bytearray(b"\1") * ((int(before) + 64) * 2**20)  # as large as the peak so far, and 64 MiB
    after = peak_memory_mib()
    assert len(block) == (int(before) + 64) * 2**20
    assert before + 64 <= after <= 2 * before + 192


def test_peak_memory_on_cuda_is_what_torch_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    assert peak_memory_mib() == 3.0


def test_phases_synchronize_on_cuda(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("sync"))
    with Phases()("policy"):
        calls.append("work")
    assert calls == ["sync", "work", "sync"]


def test_gpus_as_nvml_reports_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert gpu_info() == [Gpu(0, "A100", "580.65", 81920.0, 1024.0), Gpu(1, "L4", "580.65", 24576.0, 0.0)]


def test_no_driver_is_none(monkeypatch):
    def refuse():
        raise NVMLError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=refuse))
    assert gpu_info() is None


def test_no_nvml_package_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu_info() is None


def test_nvml_is_shut_down_after_an_error(monkeypatch):
    calls = []

    def fail(handle):
        raise NVMLError("GPU is lost")

    nvml = fake_nvml(nvmlDeviceGetName=fail, nvmlShutdown=lambda: calls.append("shutdown"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with pytest.raises(NVMLError, match="GPU is lost"):
        gpu_info()
    assert calls == ["shutdown"]
