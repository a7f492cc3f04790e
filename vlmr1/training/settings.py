"""Settings of what is checked and measured while a run trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from huggingface_hub import get_token

from vlmr1.types import Settings, setting


@dataclass
class TrainerSettings(Settings):
    """When a run warns or stops, and what it measures."""

    group = "Checks and measurements"
    if TYPE_CHECKING:

        @property
        def push_to_hub(self) -> bool: ...

    max_nonfinite: int = setting(5, "stop after this many updates in a row that were not finite")
    memory_by_phase: bool = setting(True, "measure each phase's peak memory; resets the process's peak counters")

    def check(self) -> Iterator[str]:
        yield from self.at_least(1, "max_nonfinite")
        if not self.push_to_hub:
            for name in ("hub_model_id", "hub_private_repo", "hub_revision"):
                if getattr(self, name) is not None:
                    yield f"{name} has no effect without push_to_hub"

    def check_device(self, device: str) -> Iterator[str]:
        if self.push_to_hub and get_token() is None:
            yield "push_to_hub needs a token: use `hf auth login`, or set the variable HF_TOKEN"
