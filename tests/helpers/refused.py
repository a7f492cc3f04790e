"""Settings that are refused."""

from typing import Any

import pytest

from vlmr1.commands.arguments import parse_config
from vlmr1.errors import SettingError

CPU = ["--use_cpu", "true"]  # bf16 needs a GPU, or to be told that there is none


def refusal(*arguments: str, **options: Any) -> str:
    with pytest.raises(SettingError) as caught:
        parse_config([*CPU, *arguments], **options).check_device()
    return str(caught.value)
