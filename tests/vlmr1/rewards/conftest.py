"""Two worker processes of rewards."""

from collections.abc import Iterator

import pytest

from vlmr1.rewards.pool import RewardPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    pool = RewardPool(2, timeout=1.5)
    yield pool
    pool.close()
