"""`vlmr1` where accelerate takes the CPU for a GPU: it has FSDP for those only, torch has it for both."""

import sys
from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from vlmr1.cli import main


def backend(self: PartialState, *arguments: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def allow() -> None:
    PartialState._prepare_backend = backend


if __name__ == "__main__":
    allow()
    sys.exit(main())
