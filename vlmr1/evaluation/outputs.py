"""Options that do not change the results of an evaluation: output directory, pictures, device, workers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from vlmr1.errors import SettingError

SLUG_LENGTH = 80


@dataclass(frozen=True)
class OutputOptions:
    """Output directory, pictures on the page, device, and workers of slow rewards."""

    output_dir: Path
    pictures: int = 12
    use_cpu: bool = False
    reward_workers: int = 2
    reward_timeout: float = 10.0

    def folder(self, model: str) -> Path:
        """The directory of a model's results."""
        return self.output_dir / slug(model)


def slug(model: str) -> str:
    """Convert a model's name to the name of a directory."""
    name = re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
    return (
        name
        if len(name) <= SLUG_LENGTH
        else f"{name[-SLUG_LENGTH:].strip('-.')}-{sha256(name.encode()).hexdigest()[:8]}"
    )


def slugs(models: Sequence[str]) -> list[str]:
    """Return the directory name of each model. SettingError where two are equal."""
    names = [slug(model) for model in models]
    for i, name in enumerate(names):
        if name in names[:i]:
            first = models[names.index(name)]
            raise SettingError(f"--model: {first} and {models[i]} would both be written to {name}")
    return names
