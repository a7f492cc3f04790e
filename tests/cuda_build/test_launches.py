"""Every launch of every op passes Triton's own launcher, within the limits of each architecture."""

from math import prod
from typing import Any
from unittest.mock import patch

import pytest

from tests.cuda_build.harness import CAPABILITIES, GRID, THREADS, on_stub
from tests.helpers.resources import CASES, SHARED_MEMORY
from vlmr1_kernels.triton import head


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES)
def test_launches_are_within_limits(case: str, capability: int, table: dict[str, Any]) -> None:
    with on_stub(capability) as launches, patch.object(head, "gemm_operand", lambda matrix: matrix):
        CASES[case]()
    assert launches
    for name, launch in launches:
        assert all(0 < size <= most for size, most in zip(launch.grid, GRID, strict=True)), name
        assert 0 < prod(launch.block) <= THREADS and prod(launch.block) % 32 == 0, name
        assert launch.shared_bytes <= SHARED_MEMORY[capability], name
    row = table.setdefault(case, {"launches": len(launches), "programs": 0, "shared": {}})
    assert row["launches"] == len(launches), "no architecture launches more than another"
    row["programs"] = max(row["programs"], *(prod(launch.grid) for _, launch in launches))
    row["shared"][capability] = max(launch.shared_bytes for _, launch in launches)
