"""The last findings of `make test-cuda-build` and `make test-triton`, as a part of docs/kernels.md.

python -m tests.helpers.cuda_table puts it there.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "cuda_build" / "table.json"
PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
MARKS = "<!-- made by tests/helpers/cuda_table.py -->\n", "<!-- end -->\n"
VERSIONS = ("torch", "triton", "transformers", "liger-kernel", "peft")
# Most launches of one more decoder layer in a decode step of 64 sequences.
LIMITS = {
    "Qwen2.5-VL, float32 weights": 12,
    "Qwen2.5-VL, bfloat16 weights": 12,
    "Qwen2.5-VL, LoRA": 26,
    "Qwen3-VL, float32 weights": 14,
}


def update(**parts: dict[str, Any]) -> None:
    """Replace parts of the table."""
    found = json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
    PATH.write_text(json.dumps(found | parts, indent=1) + "\n", encoding="utf-8")


def rendered() -> str:
    return "\n".join(_lines(json.loads(PATH.read_text(encoding="utf-8")))) + "\n"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield f"With {versions}; no GPU was used."
    yield "\n| of a decode step with 64 sequences | launches | limit |\n|---|---|---|"
    for name, count in found["decode"].items():
        layer = name in LIMITS
        yield _row(f"one decoder layer, {name}" if layer else name, f"{count:g}", LIMITS.get(name, ""))
    yield "\n| `linear_grpo_loss`, 8192 x 2048 x 151936 | matrix products | Triton | all launches |\n|---|---|---|---|"
    for name, counts in found["training_ops"].items():
        yield _row(name, *counts.values())
    kinds = list(next(iter(found["launches"].values()))["shared"])
    yield "\n" + _row(
        "op on tensors without data", "launches", "programs", *(f"shared bytes, sm_{each}" for each in kinds)
    )
    yield "|---|---|---|" + "---|" * len(kinds)
    for name, row in found["launches"].items():
        yield _row(name, row["launches"], row["programs"], *row["shared"].values())
    if "triton" in found:
        yield "\n| Triton | compile tests passed | not passed |\n|---|---|---|"
        for each in found["triton"].values():
            yield _row(each["version"], each["passed"], ", ".join(each["others"]) or "none")


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    PAGE.write_text(before + MARKS[0] + rendered() + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")


if __name__ == "__main__":
    main()
