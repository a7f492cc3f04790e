from collections.abc import Iterator

import pytest
import torch

from tests.helpers import interpreter
from tests.helpers.kernel_cases import Target, targets


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parameter `target`: every implementation of the module's OP on every device, where a test chooses none."""
    chosen = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "target" in metafunc.fixturenames and not any("target" in names for names in chosen):
        metafunc.parametrize("target", targets(metafunc.module.OP))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter is slow: only the first of a test's parameters for it are in `make test-fast`."""
    seen = set()
    for item in items:
        target = item.callspec.params.get("target") if hasattr(item, "callspec") else None
        if isinstance(target, Target) and target.interpreted:
            name = item.nodeid.partition("[")[0]
            if name in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(name)


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory that torch hands out uninitialized is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(20)
    if interpreter.AVAILABLE:
        monkeypatch.setenv(interpreter.VARIABLE, "1")
