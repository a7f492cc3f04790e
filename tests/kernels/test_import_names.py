"""`kernels/` is only a source root: transformers probes for a PyPI package of that name."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


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
    assert run(code % str(ROOT)) == "True False"


def test_our_package_needs_neither_transformers_nor_triton() -> None:
    code = """
import sys, vlmr1_kernels
print([name for name in ("transformers", "triton", "flash_attn", "vlmr1", "trl") if name in sys.modules])
"""
    assert run(code) == "[]"
