"""The trainer is imported without packages that only some rewards and reports need; a missing one is named."""

import sys
from importlib.machinery import ModuleSpec

import pytest

from tests.helpers import digit_runs, optional
from tests.helpers.python import python
from vlmr1.errors import SettingError
from vlmr1.rewards import score
from vlmr1.tiny import digits

BOXES = '<answer>[{"bbox_2d": [0, 0, 10, 10], "label": "a"}]</answer>'
BENCHMARKS = "gpu, gpu_parts, gpu_training, ops, step_session, planned"
BARE = f"""
from benchmarks import {BENCHMARKS}
from vlmr1 import cli
from vlmr1.commands import evaluate, plan, report, sft
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_needs_torch_transformers_and_accelerate_only(tmp_path):
    digits.write(tmp_path, "train", 2, seed=3)
    words = digit_runs.command(tmp_path, tmp_path / "out", max_steps=1, write_report="true")
    result = python("-m", "tests.helpers.bare", BARE, *words)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert "pip install 'matplotlib'" in result.stderr


LIGHT = {"data.samples": {"datasets", "pyarrow", "torch"}, "rewards.worker": {"torch"}}


@pytest.mark.parametrize("module, absent", LIGHT.items(), ids=LIGHT)
def test_what_a_module_does_not_import(module, absent):
    found = python("-c", f"import sys, vlmr1.{module}; print({absent} & set(sys.modules))", check=True)
    assert found.stdout == "set()\n"


@pytest.mark.parametrize("mode", ["strict", "vlm_r1"])
@pytest.mark.parametrize(
    ("module", "install", "method", "content", "solution"),
    [
        ("pycocotools.mask", "pycocotools", "map", BOXES.replace("[{", "```json\n[{").replace("}]", "}]\n```"), None),
        ("rapidfuzz.distance", "rapidfuzz", "default", "<answer>a red hat</answer>", "a blue hat"),
        ("math_verify", "math-verify", "math", "<answer>x^2</answer>", "x^3"),
    ],
)
def test_a_missing_package_is_named(module, install, method, content, solution, mode, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.partition(".")[0], None)
    with pytest.raises(SettingError, match=f"pip install '{install}'"):
        score("accuracy", content, solution or content, mode=mode, accu_reward_method=method)


@pytest.mark.parametrize(
    ("name", "skipped"), [("scipy.gone", None), ("absent", None), ("vlmr1.gone", None), ("trl", "trl"), (None, None)]
)
def test_only_tests_without_their_package_are_skipped(name, skipped, monkeypatch):
    """A module that an installed package lacks is an error."""
    monkeypatch.setattr(optional, "find_spec", lambda package: None if package == "trl" else ModuleSpec(package, None))
    monkeypatch.delenv(optional.REQUIRED, raising=False)
    assert optional.missing(ModuleNotFoundError(name=name)) == skipped
    assert optional.missing(ImportError(name=name)) is None
    monkeypatch.setenv(optional.REQUIRED, "1")
    assert optional.missing(ModuleNotFoundError(name=name)) is None
