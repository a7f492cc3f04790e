"""What `make test-cuda-build` found last is in the docs, within the limits, and of the ops that there are."""

import json

import pytest

from tests.helpers.cuda_table import LIMITS, PAGE, PATH, rendered


def test_table() -> None:
    found = json.loads(PATH.read_text(encoding="utf-8"))
    assert rendered() in PAGE.read_text(encoding="utf-8"), "python -m tests.helpers.cuda_table"
    assert {name: found["decode"][name] for name, most in LIMITS.items() if found["decode"][name] > most} == {}


def test_every_case_is_in_the_table() -> None:
    pytest.importorskip("triton")
    from tests.helpers.resources import CASES

    launches = json.loads(PATH.read_text(encoding="utf-8"))["launches"]
    assert set(launches) == set(CASES), "make test-cuda-build"
