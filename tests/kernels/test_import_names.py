"""`kernels/` is only a source root: transformers probes for a PyPI package of that name."""

import pytest

from tests.helpers.python import ROOT, environment, python


def printed(code: str) -> str:
    done = python("-c", code, env={"PYTHONPATH": environment()["PYTHONPATH"], "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_transformers_does_not_take_our_folder_for_its_package() -> None:
    code = """
import importlib.metadata, importlib.util, transformers
from transformers.utils import import_utils
installed = any(d.name == "kernels" for d in importlib.metadata.distributions())
spec = importlib.util.find_spec("kernels")
ours = spec is not None and (spec.origin or "").startswith(%r)
print(import_utils.is_kernels_available() == installed, ours)
import transformers.integrations.hub_kernels
"""
    assert printed(code % str(ROOT)) == "True False"


def test_our_package_needs_neither_transformers_nor_triton() -> None:
    code = """
import sys, vlmr1_kernels
print([name for name in ("transformers", "triton", "flash_attn", "vlmr1", "trl") if name in sys.modules])
"""
    assert printed(code) == "[]"
