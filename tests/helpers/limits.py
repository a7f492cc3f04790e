"""The limits of tests/counting/limits.toml, for the tests that they name."""

import tomllib
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "counting" / "limits.toml"
LIMITS: list[dict[str, Any]] = tomllib.loads(PATH.read_text(encoding="utf-8"))["limit"]


def limit_of(what: str) -> float:
    """The limit of what is counted, whose name starts so; exactly one does."""
    [limit] = [each["limit"] for each in LIMITS if each["what"].startswith(what)]
    return limit
