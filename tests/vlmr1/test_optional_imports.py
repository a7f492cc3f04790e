"""The trainer is imported without packages that only some rewards and reports need; a missing one is named."""

import sys

import pytest

from tests.helpers.python import python
from vlmr1.errors import SettingError
from vlmr1.rewards import score

OPTIONAL = ("pycocotools", "rapidfuzz", "math_verify", "matplotlib", "jinja2", "datasets", "peft", "sklearn")
BOXES = '<answer>[{"bbox_2d": [0, 0, 10, 10], "label": "a"}]</answer>'


@pytest.mark.slow
def test_the_trainer_needs_torch_and_transformers_only():
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL})); import vlmr1.grpo.trainer, vlmr1.rewards"
    result = python("-c", code)
    assert result.returncode == 0, result.stderr


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
