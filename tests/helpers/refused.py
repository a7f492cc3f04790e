"""Refusals: settings, and the entries of `tests/golden/refusals.jsonl`, which `test_refusals.py` describes."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlmr1.commands.arguments import parse_config
from vlmr1.errors import SettingError

CPU = ["--use_cpu", "true"]  # bf16 needs a GPU, or to be told that there is none
_LIST = Path(__file__).parents[1] / "golden" / "refusals.jsonl"
REFUSALS: list[dict[str, Any]] = [json.loads(line) for line in _LIST.read_text(encoding="utf-8").splitlines()]


def refusal(*arguments: str, **options: Any) -> str:
    with pytest.raises(SettingError) as caught:
        parse_config([*CPU, *arguments], **options).check_device()
    return str(caught.value)
