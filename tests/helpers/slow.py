"""Tests with many sets of parameters, of which few are enough for `make test-fast`."""

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def mostly_slow(cases: Mapping[str, Any] | Iterable[str], *quick: str) -> list[Any]:
    """Parameters by their ids, all but `quick` marked slow. A tuple in a mapping holds several arguments."""
    named = cases if isinstance(cases, Mapping) else {name: name for name in cases}
    assert set(quick) <= set(named)
    found = []
    for name, value in named.items():
        values = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*values, id=name, marks=[] if name in quick else [pytest.mark.slow]))
    return found
