"""Settings that are refused. `tests/golden/refusals.jsonl` has a case of each refusal; tests add further values."""

from __future__ import annotations

from typing import Any

import pytest

from vlmr1.commands.arguments import parse_config
from vlmr1.errors import SettingError

CPU = ["--use_cpu", "true"]  # bf16 needs a GPU, or to be told that there is none


def refusal(*arguments: str, **options: Any) -> str:
    with pytest.raises(SettingError) as caught:
        parse_config([*CPU, *arguments], **options).check_device()
    return str(caught.value)


def table(text: str) -> list[Any]:
    """Cases of a test, one in a line: the words of a command and what the message must hold, "--beta -1 | beta is"."""
    rows = [line.split(" | ") for line in text.strip().splitlines()]
    return [pytest.param(words.split(), message, id=words) for words, message in rows]
