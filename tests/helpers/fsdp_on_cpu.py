"""`vlmr1` where accelerate takes the CPU for a GPU: it has FSDP for those only, torch has it for both."""

from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from vlmr1.cli import main
from vlmr1.lifecycle.processes import exit_process


def backend(self: PartialState, *arguments: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def allow() -> None:
    PartialState._prepare_backend = backend


if __name__ == "__main__":
    allow()
    exit_process(main())
