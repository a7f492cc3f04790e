"""FSDP on the CPU: accelerate has it for GPUs only, torch has it for both."""

from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType


def backend(self: PartialState, *arguments: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def allow() -> None:
    PartialState._prepare_backend = backend
