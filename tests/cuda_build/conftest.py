"""Tests for a CUDA build of torch on a machine without a GPU: `make test-cuda-build`.

Other tests load Triton interpreted, in the conftest above this one, which these do not read (--confcutdir); pytest
collects them only by name (norecursedirs in pyproject.toml).
"""

from importlib.metadata import version
from typing import Any

import pytest
import torch

from tests.helpers.cuda_table import VERSIONS, update

MEASURED: dict[str, dict[str, Any]] = {}


def pytest_sessionstart() -> None:
    if torch.version.cuda is None:
        pytest.exit(f"torch {torch.__version__} is no CUDA build: run `make test-cuda-build`", returncode=1)


@pytest.fixture
def table(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The rows of a module, written to table.json when every test has passed."""
    return MEASURED.setdefault(request.module.__name__.rpartition("test_")[2], {})


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus or session.config.option.keyword or any("::" in name for name in session.config.args):
        return
    update(versions={name: version(name) for name in VERSIONS}, **MEASURED)
