"""What `vlmr1 doctor` says: versions, GPUs, and the choice of every op with its reasons."""

import re
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from vlmr1.commands import doctor as room
from vlmr1.telemetry.phases import Gpu
from vlmr1_kernels import registry


def value(report: str, name: str) -> str:
    """What the one line of this name says."""
    (found,) = re.findall(rf"^  {re.escape(name)} +(.*)$", report, re.MULTILINE)
    return found


@pytest.fixture
def report() -> str:
    return room.doctor()


def test_every_op_with_its_choice_and_all_others_refused_by_name(report):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    explanations = registry.explain_all(device, torch.bfloat16 if device == "cuda" else torch.float32)
    assert [e.op for e in explanations] == list(registry.ops())
    for explanation in explanations:
        assert value(report, explanation.op) == explanation.chosen
        assert {explanation.chosen, *explanation.others} == set(registry.implementations(explanation.op))
    said = re.findall(r"^    not (\w+): (.+)$", report, re.MULTILINE)
    assert said == [(name, why) for e in explanations for name, why in e.others.items()]


@pytest.mark.parametrize("name", room.OPTIONAL)
def test_an_optional_package_there_or_not(name, monkeypatch):
    monkeypatch.setattr(room, "version", lambda distribution: {name: "9.8.7"}.get(distribution) or missing())
    assert value(room.doctor(), name) == "9.8.7"
    monkeypatch.setattr(room, "version", lambda distribution: missing())
    assert value(room.doctor(), name) == "not installed"


def missing() -> str:
    raise PackageNotFoundError


@pytest.mark.parametrize(
    ("gpus", "nvml", "expected"),
    [
        pytest.param(
            [Gpu(0, "NVIDIA L4", "580.65", 23034.0, 512.0)],
            "13.0",
            ("GPU 0", "NVIDIA L4, 512 of 23,034 MiB used, driver 580.65"),
            id="one",
        ),
        pytest.param([], "13.0", ("GPU", "none: the NVIDIA driver runs, but has no GPU"), id="driver-only"),
        pytest.param(None, "13.0", ("GPU", "none: NVML finds no working NVIDIA driver"), id="no-driver"),
        pytest.param(None, "not installed", ("GPU", "unknown: nvidia-ml-py is not installed"), id="no-package"),
    ],
)
def test_gpus(gpus, nvml, expected, monkeypatch):
    monkeypatch.setattr(room, "gpu_info", lambda: gpus)
    monkeypatch.setattr(room, "installed", lambda name: nvml)
    assert value(room.doctor(), expected[0]) == expected[1]


def test_the_native_library(monkeypatch):
    monkeypatch.setattr(room.library, "unavailable_reason", lambda: None)
    monkeypatch.setattr(room.library, "backend", lambda: "avx2")
    assert value(room.doctor(), "native library") == "libvlmr1_kernels.so, instruction set avx2"
    monkeypatch.setattr(
        room.library, "unavailable_reason", lambda: "the native library is not built; it needs a C++ compiler"
    )
    assert value(room.doctor(), "native library") == "the native library is not built; it needs a C++ compiler"
