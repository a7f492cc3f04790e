"""The last findings of `make test-cuda-build` are in the docs, within the limits."""

import json

from tests.helpers.cuda_table import LIMITS, PAGE, PATH, rendered


def test_table() -> None:
    found = json.loads(PATH.read_text(encoding="utf-8"))
    assert rendered() in PAGE.read_text(encoding="utf-8"), "python -m tests.helpers.cuda_table"
    assert {name: found["decode"][name] for name, most in LIMITS.items() if found["decode"][name] > most} == {}
