"""Options that do not change the results of an evaluation: output directory, pictures, device, workers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path

from vlmr1.errors import SettingError
from vlmr1.types import Settings, setting

SLUG_LENGTH = 80


@dataclass(frozen=True)
class OutputOptions(Settings):
    """Output directory, pictures on the page, device, workers of slow rewards, and how long processes wait."""

    output_dir: Path = setting(MISSING, "one directory a model is written there")
    pictures: int = setting(12, "best and worst cases on the page, as many of each")
    use_cpu: bool = setting(False, "leave a GPU alone")
    reward_workers: int = setting(2, "processes for scores that may hang; 0: none, no time limit")
    reward_timeout: float = setting(10.0, "seconds a completion, in those processes")
    ddp_timeout: float = setting(1800.0, "seconds that processes wait for each other")

    def __post_init__(self) -> None:
        faults = self.at_least(0, "pictures", "reward_workers"), self.above_zero("reward_timeout", "ddp_timeout")
        for fault in chain(*faults):
            raise SettingError(f"--{fault}")

    def folder(self, model: str) -> Path:
        """The directory of a model's results."""
        return self.output_dir / slug(model)


def slug(model: str) -> str:
    """Convert a model's name to the name of a directory."""
    name = re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
    if len(name) <= SLUG_LENGTH:
        return name
    return f"{name[-SLUG_LENGTH:].strip('-.')}-{sha256(name.encode()).hexdigest()[:8]}"


def slugs(models: Sequence[str]) -> list[str]:
    """Return the directory name of each model. SettingError where two are equal."""
    names = [slug(model) for model in models]
    for i, name in enumerate(names):
        if name in names[:i]:
            first = models[names.index(name)]
            raise SettingError(f"--model: {first} and {models[i]} would both be written to {name}")
    return names
