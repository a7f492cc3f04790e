"""The model and processor of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vlmr1.distributed.ranks import local_device
from vlmr1.evaluation.options import Options
from vlmr1.models import load_model, load_processor, model_type_of
from vlmr1.tiny import model_path


@dataclass(frozen=True)
class Source:
    """A model by name, with the options that it is read with."""

    name: str
    options: Options

    @property
    def path(self) -> str:
        return model_path(self.name)

    @property
    def arguments(self) -> dict[str, Any]:
        return {"revision": self.options.revision, "trust_remote_code": self.options.trust_remote_code}

    def model_type(self) -> str:
        return model_type_of(self.path, **self.arguments)

    def model(self, *, use_cpu: bool) -> Any:
        """The model in evaluation mode, on this process's device."""
        model: Any = load_model(self.path, dtype=getattr(torch, self.options.dtype), **self.arguments)
        return model.to(local_device(use_cpu)).eval()

    def processor(self) -> Any:
        return load_processor(self.path, **self.arguments)
