"""A notebook in a kernel of Jupyter: a short run and its report."""

import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parents[3]
SETUP = """
import numpy as np
from PIL import Image
from vlmr1 import GRPOConfig, GRPOTrainer

def short(completions, **columns):
    print("a reward prints")
    return [-len(completion[0]["content"]) for completion in completions]

image = Image.fromarray(np.zeros((56, 84, 3), np.uint8))
rows = [{"prompt": [{"role": "user", "content": f"Where is {i}?"}], "image": image} for i in range(4)]
settings = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1)
settings |= dict(max_steps=3, num_generations=2, per_device_train_batch_size=4, max_completion_length=4)
trainer = GRPOTrainer("MODEL", short, GRPOConfig("out", **settings), rows)
"""


class Client(NotebookClient):
    """Keeps the texts of displays that are updated."""

    shown: list[str]

    def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] == "update_display_data":
            self.shown.append(msg["content"]["data"]["text/plain"])
        return super().process_message(msg, cell, cell_index)


@pytest.mark.slow
def test_a_notebook_shows_a_run_once_and_its_report(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    )
    cells = [SETUP.replace("MODEL", str(tiny)), "trainer.train();", "trainer.report()"]
    book = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    client = Client(book, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.shown = []
    client.execute()
    setup, train, report = ([dict(output) for output in cell.outputs] for cell in book.cells)
    assert all(re.fullmatch(r"[\r\n]*(Loading weights: .*[\r\n]*)*", output["text"]) for output in setup), setup
    # One display, of the lines that stay; while the run goes on there is a progress line below them.
    (display,) = [output for output in train if output["output_type"] == "display_data"]
    lines = display["data"]["text/plain"].splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1", "step 2", "step 3"]
    assert any(re.search(r"^step 2/3 █+\S? .* ETA [0-9:]+$", text, re.MULTILINE) for text in client.shown)
    assert all(text.count("ETA") <= 1 for text in client.shown)
    printed = "".join(output["text"] for output in train if output["output_type"] == "stream")
    assert re.fullmatch("(reward short printed .*: a reward prints\n){3}", printed)
    (result,) = report
    assert result["data"]["text/plain"] == "Page('out/training.html')"
    assert (tmp_path / "out/training.html").is_file() and "<iframe" in result["data"]["text/html"]
    nbformat.validate(book)
