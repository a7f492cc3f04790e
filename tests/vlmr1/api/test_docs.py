"""The scripts of docs/python.md run as they are, but for the model, the data and the size of the run."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import pytest

from docs.generate import on_page_markdown
from tests.helpers.api import rows

DOCS = Path(__file__).parents[3] / "docs"
SCRIPTS = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), flags=re.DOTALL)
SIZE = ", max_steps=1, max_completion_length=8"


@pytest.mark.parametrize("script", SCRIPTS, ids=["migration", "reward", "weights", "lora", "evaluation"])
def test_scripts_of_the_docs_run(script: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list(rows(4, solution=str)).to_parquet("rows.parquet")
    text = script.replace("Qwen/Qwen2.5-VL-3B-Instruct", str(tiny))
    text, count = re.subn(r'GRPOConfig\(("runs/[a-z]+")', rf"GRPOConfig(\1{SIZE}", text)
    assert count == 1
    exec(compile(text, "script", "exec"), {})
    if ".save_model" in text:
        assert list(tmp_path.glob("runs/*/final/*.safetensors"))


def test_generated_tables_of_the_docs() -> None:
    page = on_page_markdown((DOCS / "from-trl.md").read_text())
    assert "<!--" not in page
    assert "| `loss_type` | `dapo` | `grpo` |" in page and "| `use_vllm` | rollout_engine=native" in page
