"""Energy of a sample, by the device's own counter."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlmr1.telemetry.nvml import GpuMeter


class Joules:
    """What the GPU drew during a call, whoever's process caused it; None without NVML or without a GPU."""

    def __init__(self, device: str):
        self.meter = GpuMeter.of(torch.device(device))

    def around(self, call: Callable[[], float]) -> tuple[float, float | None]:
        """(what the call returns, joules). The device's work is to be over when it returns."""
        if self.meter is None:
            return call(), None
        self.meter.begin()
        seconds = call()
        return seconds, self.meter.end().get("gpu/energy_joules")
