"""Everything that is refused: `refusals.jsonl` lists each refusal with what catches it, and holds the command line of
those that one can show.

An entry: `condition` in plain words; `words` that the message must hold; `where` it was first written; and one of
`arguments` (with `files` that they need), `test`, or `unreachable` with the reason."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.refused import REFUSALS
from vlmr1.cli import main

ROOT = Path(__file__).parents[2]
SHOWN = [entry for entry in REFUSALS if "arguments" in entry]
DEFAULTS = {
    "train": "--model_name_or_path tiny --data_file_paths rows.jsonl --image_folders images --output_dir out "
    "--use_cpu true --max_steps 1 --num_generations 2 --prompts_per_device 1 --write_report false",
    "evaluate": "--model tiny --task rec --data rows.jsonl --images images --output_dir out --use_cpu",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: three rows with an image each, a strip, and an image that is cut off."""
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for number in range(3):
        Image.fromarray(np.full((56, 56, 3), 80 * number, dtype=np.uint8)).save(f"images/{number}.png")
    Image.new("RGB", (600, 1)).save("images/strip.png")
    Path("images/broken.png").write_bytes(Path("images/0.png").read_bytes()[:60])
    row = {"prompt": "Locate the digit 1.", "solution": '<answer>{"bbox_2d": [0, 0, 28, 28]}</answer>'}
    rows = [json.dumps(row | {"image": f"{number}.png"}) for number in range(3)]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def command_line(entry: dict[str, Any]) -> list[str]:
    """The entry's words behind the defaults of its command, which they replace."""
    command, *words = entry["arguments"]
    defaults = [] if entry.get("bare") else DEFAULTS.get(command, "").split(" --")
    pairs = [each.removeprefix("--").split() for each in defaults if each]
    kept = [word for name, *value in pairs if f"--{name}" not in words for word in (f"--{name}", *value)]
    return [command, *words] if words[:1] == ["compare"] else [command, *kept, *words]


@pytest.mark.slow
@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry["condition"]) for entry in SHOWN])
def test_refused_on_the_command_line(entry: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]):
    for name, content in entry.get("files", {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    assert main(command_line(entry)) == 2
    _, found, message = capsys.readouterr().err.rpartition("vlmr1: ")
    assert found and [word for word in entry["words"] if word not in message] == [], message
    if re.search(r":\d+$", entry["words"][0]):  # a row is named before training, and first
        assert message.startswith(entry["words"][0]), message


def test_the_list_is_complete():
    """Every refusal is shown, tested elsewhere, or cannot be reached on a CPU, and then says why."""
    conditions = [entry["condition"] for entry in REFUSALS]
    assert len(set(conditions)) == len(conditions)
    for entry in REFUSALS:
        assert sum(key in entry for key in ("arguments", "test", "unreachable")) == 1, entry["condition"]
        if "test" in entry:
            path, *_, name = entry["test"].partition("[")[0].split("::")
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), entry["condition"]
