from collections.abc import Iterator

import pytest
import torch

from tests.helpers import interpreter


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that torch hands out uninitialized is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreter.AVAILABLE:
        monkeypatch.setenv(interpreter.VARIABLE, "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20)
