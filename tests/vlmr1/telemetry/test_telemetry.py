"""Seconds and peak memory by phase, what NVML reports, and what of it is logged."""

import os
import sys
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.trainers import trainer_of
from vlmr1.telemetry import peaks
from vlmr1.telemetry.nvml import GpuMeter
from vlmr1.telemetry.peaks import Peaks
from vlmr1.telemetry.phases import Gpu, Phases, gpu_info, peak_memory_mib
from vlmr1.training.pending_metrics import costs
from vlmr1.types import StepMetrics


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


def run_through(*names, memory=False):
    phases = Phases(memory=memory)
    for name in names:
        with phases(name):
            pass
    return phases


def test_phases_add_up_and_one_that_raises_is_counted(monkeypatch):
    clock = iter([10.0, 10.5, 20.0, 21.25, 30.0, 32.0, 40.0, 40.5])
    monkeypatch.setattr("vlmr1.telemetry.phases.perf_counter", lambda: next(clock))
    phases = run_through("rollout", "policy", "rollout")
    with pytest.raises(KeyError, match="lost"), phases("reward"):
        raise KeyError("lost")
    assert phases.seconds == {"rollout": 2.5, "policy": 1.25, "reward": 0.5}


def test_peak_memory_on_cuda_is_what_torch_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    assert peak_memory_mib() == 3.0


class Event:
    """A CUDA event at whose turn the device's clock shows the next of `clock`, in ms."""

    def __init__(self, calls, clock):
        self.calls, self.clock = calls, clock

    def record(self):
        self.time = next(self.clock)

    def synchronize(self):
        self.calls.append("wait")

    def elapsed_time(self, end):
        return end.time - self.time


def test_phases_on_cuda_wait_where_they_are_read(monkeypatch):
    calls, clock, cuda = [], iter([0.0, 500.0, 600.0, 1000.0]), iter([False, True, True, True, True, True])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: next(cuda))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(calls, clock))
    host = iter([1.0, 4.0, 0.0, 0.0])
    monkeypatch.setattr("vlmr1.telemetry.phases.perf_counter", lambda: next(host))
    phases = run_through("rollout")  # which initializes CUDA
    assert calls == ["wait"]
    with phases("policy"):
        pass
    assert calls == ["wait"]
    assert phases.seconds == {"rollout": 3.0, "policy": 0.1} and calls == ["wait", "wait"]
    assert phases.seconds == {"rollout": 3.0, "policy": 0.1} and calls == ["wait", "wait"]


def test_gpus_as_nvml_reports_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert gpu_info() == [Gpu(0, "A100", "580.65", 81920.0, 1024.0), Gpu(1, "L4", "580.65", 24576.0, 0.0)]


def unsupported(*_):
    raise NVMLError("Not Supported")


@pytest.mark.parametrize("nvml", [fake_nvml(nvmlInit=unsupported), None], ids=["no driver", "no package"])
def test_no_gpus_without_nvml(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert gpu_info() is None


def test_nvml_is_shut_down_after_an_error(monkeypatch):
    calls = []
    nvml = fake_nvml(nvmlDeviceGetName=unsupported, nvmlShutdown=lambda: calls.append("shutdown"))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with pytest.raises(NVMLError, match="Not Supported"):
        gpu_info()
    assert calls == ["shutdown"]


# Memory by phase


class Kernel:
    """The files that Linux has for a process's high-water mark, with these marks in MiB: the next is read after each
    reset."""

    def __init__(self, folder, marks):
        self.status, self.resets, self.marks = folder / "status", [], iter(marks)
        self.advance()

    def advance(self):
        self.status.write_text(f"Name:\tpython\nVmPeak:\t9999999 kB\nVmHWM:\t{next(self.marks) * 1024} kB\n")

    def write_text(self, text):
        self.resets.append(text)
        self.advance()


@pytest.fixture
def kernel_of(monkeypatch, tmp_path):
    def kernel_of(marks, rusage=0):
        kernel = Kernel(tmp_path, marks)
        monkeypatch.setattr("vlmr1.telemetry.phases.PEAKS", Peaks())
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        monkeypatch.setattr(peaks, "STATUS", kernel.status)
        monkeypatch.setattr(peaks, "CLEAR", kernel)
        usage = SimpleNamespace(ru_maxrss=rusage * (2**20 if sys.platform == "darwin" else 1024))
        monkeypatch.setattr(peaks.resource, "getrusage", lambda who: usage)
        return kernel

    return kernel_of


def test_memory_of_a_phase_is_its_own_peak(kernel_of):
    """50 before the first phase, 146 in it, 60 between, 70 in the second; the process's own mark lags behind."""
    kernel = kernel_of([50, 146, 60, 70, 40], rusage=100)
    phases = run_through("rollout", "reward", memory=True)
    assert phases.memory == {"rollout": 146, "reward": 70}
    assert kernel.resets == ["5"] * 4
    assert peak_memory_mib() == 146  # forgotten by the kernel, not by us


def test_peak_memory_is_the_kernels_where_no_phase_was_measured(kernel_of):
    kernel_of([50], rusage=120)
    assert peak_memory_mib() == 120


def fake_cuda(monkeypatch, marks):
    """torch.cuda with these peaks in MiB, one a look; a reset is noted as None."""
    seen = []
    values = iter(marks)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event([], count()))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: seen.append(next(values)) or seen[-1] * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: seen.append(None))
    return seen


def test_peaks_on_cuda_are_read_before_they_are_reset(monkeypatch):
    """10 before the first phase, 30 and 20 in it twice, 50 between, 40 in an inner phase, which the outer has too."""
    monkeypatch.setattr("vlmr1.telemetry.phases.PEAKS", Peaks())
    seen = fake_cuda(monkeypatch, [10, 30, 50, 20, 5, 15, 40, 25, 8])
    phases = run_through("forward", "forward", memory=True)
    with phases("outer"), phases("inner"):
        pass
    assert phases.memory == {"forward": 30, "outer": 40, "inner": 40}
    assert seen == [mark for value in [10, 30, 50, 20, 5, 15, 40, 25] for mark in (value, None)]
    assert peak_memory_mib() == 50


def test_memory_is_not_measured_unasked(monkeypatch):
    seen = fake_cuda(monkeypatch, [])
    phases = run_through("forward")
    assert seen == [] and phases.memory == {} and list(phases.seconds) == ["forward"]


def test_a_kernel_that_does_not_reset_is_said_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("vlmr1.telemetry.phases.PEAKS", Peaks())
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(peaks, "CLEAR", tmp_path / "no" / "clear_refs")
    phases = run_through("rollout", "reward", memory=True)
    assert phases.memory == {} and list(phases.seconds) == ["rollout", "reward"]
    assert caplog.text.count("peak memory by phase is not reported") == 1
    assert peak_memory_mib() > 0


# The GPU of this process


UUIDS = {"GPU-aaaa": "first", "GPU-bbbb": "second"}


def device_nvml(**changes):
    """NVML of two GPUs; CUDA_VISIBLE_DEVICES shows the process the second, as its device 0."""

    def by_uuid(uuid):
        if uuid not in UUIDS:
            raise NVMLError("Not Found")
        return UUIDS[uuid]

    energy = iter([5_000_000, 5_001_500])  # mJ
    process = SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * 2**30)
    other = SimpleNamespace(pid=-1, usedGpuMemory=2**30)
    places = {"00000000:41:00.0": "by place"}
    nvml = {
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetHandleByPciBusId": lambda place: places[place],
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(used={"first": 1, "second": 7}[handle] * 2**30),
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [other, process],
        "nvmlDeviceGetPowerUsage": lambda handle: {"first": 60_000, "second": 250_500}[handle],
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: next(energy),
    }
    return fake_nvml(**{**nvml, **changes})


@pytest.fixture
def meter_of(monkeypatch):
    def meter_of(nvml, uuid="bbbb"):
        properties = SimpleNamespace(uuid=uuid, pci_domain_id=0, pci_bus_id=0x41, pci_device_id=0)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return GpuMeter.of(torch.device("cuda:0"))

    return meter_of


def test_readings_are_of_the_device_with_torchs_uuid(meter_of):
    meter = meter_of(device_nvml())
    meter.begin()
    assert meter.end() == {
        "gpu/memory_used_mib": 7 * 1024,
        "gpu/process_memory_mib": 3 * 1024,
        "gpu/power_watts": 250.5,
        "gpu/energy_joules": 1500 / 1000,
    }


def test_a_slice_of_a_gpu_is_found_by_its_place(meter_of):
    assert meter_of(device_nvml(), uuid="of a slice")._handle == "by place"


READINGS = [
    ("nvmlDeviceGetTotalEnergyConsumption", "gpu/energy_joules", "energy"),
    ("nvmlDeviceGetPowerUsage", "gpu/power_watts", "power"),
    ("nvmlDeviceGetMemoryInfo", "gpu/memory_used_mib", "memory in use"),
    ("nvmlDeviceGetComputeRunningProcesses", "gpu/process_memory_mib", "memory by process"),
]


@pytest.mark.parametrize(("function", "left_out", "said"), READINGS)
def test_what_a_device_does_not_support_is_left_out_and_said_once(function, left_out, said, meter_of, caplog):
    nvml = device_nvml(**{function: unsupported})
    if left_out != "gpu/energy_joules":
        nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: 0
    meter = meter_of(nvml)
    whole = set(GpuMeter(device_nvml(), "second").end()) | {"gpu/energy_joules"}
    for _ in range(2):
        meter.begin()
        assert set(meter.end()) == whole - {left_out}
    assert caplog.text.count(f"{said} of this GPU is not reported: Not Supported") == 1


def test_a_process_that_the_driver_knows_by_another_id(meter_of):
    meter = meter_of(device_nvml(nvmlDeviceGetComputeRunningProcesses=lambda handle: []))
    meter.begin()
    assert "gpu/process_memory_mib" not in meter.end()


def test_no_meter_without_gpu_package_or_driver(meter_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", device_nvml())
    assert GpuMeter.of(torch.device("cpu")) is None
    assert meter_of(device_nvml(nvmlInit=unsupported)) is None
    assert meter_of(None) is None


# What is logged


def test_costs():
    """Two steps; the second is an update on the same generation."""
    one = StepMetrics({"tokens": 300.0}, {"rollout": 6.0, "forward": 1.0, "backward": 2.0, "update": 1.0})
    other = StepMetrics({"tokens": 100.0}, {"forward": 2.0, "backward": 3.0, "update": 1.0})
    one.memory["rollout"], other.memory["forward"] = 9.0, 7.0
    assert costs([one, other]) == {
        "seconds/rollout": 3.0,
        "seconds/forward": 1.5,
        "seconds/backward": 2.5,
        "seconds/update": 1.0,
        "memory/rollout_mib": 9.0,
        "memory/forward_mib": 7.0,
        "tokens_per_second": 400 / 16,
        "update/tokens_per_second": 400 / 10,
    }


PHASES = ["rollout", "reward", "reference", "old", "forward", "backward", "update"]


@pytest.mark.parametrize("measured", [True, False])
def test_every_phase_of_a_step_is_logged(measured, model, processor, monkeypatch, tmp_path):
    monkeypatch.setattr("vlmr1.telemetry.phases.PEAKS", SimpleNamespace(lap=lambda: 7.0, peak=lambda: 9.0))
    trainer = trainer_of(model, processor, tmp_path, memory_by_phase=measured)
    trainer.gpu = GpuMeter(device_nvml(), "second")
    trainer.train()
    row = trainer.state.log_history[0]
    assert [name for name in row if name.startswith("seconds/")] == [f"seconds/{phase}" for phase in PHASES]
    memory = [f"memory/{phase}_mib" for phase in PHASES] if measured else []
    assert [name for name in row if name.startswith("memory/")] == [*memory, "memory/peak_mib"]
    assert row["memory/peak_mib"] == 9.0 and all(row[name] == 7.0 for name in memory)
    total = sum(row[f"seconds/{phase}"] for phase in PHASES)
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / total)
    assert row["gpu/energy_joules"] == 1.5 and row["gpu/memory_used_mib"] == 7 * 1024
