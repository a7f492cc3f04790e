"""Everything that is refused: the entries of `tests/golden/refusals.jsonl`, which `test_refusals.py` describes."""

import json
from pathlib import Path
from typing import Any

_LIST = Path(__file__).parents[1] / "golden" / "refusals.jsonl"
REFUSALS: list[dict[str, Any]] = [json.loads(line) for line in _LIST.read_text(encoding="utf-8").splitlines()]
