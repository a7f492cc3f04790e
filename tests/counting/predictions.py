"""The tables of predicted time in docs/: python -m tests.counting.predictions writes them (some minutes).

Each row is `vlmr1 plan --time` for one model, completion length and set of settings.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.helpers.jobs import job
from vlmr1.planner.cards import CARDS
from vlmr1.planner.known_models import config_named
from vlmr1.planner.rollout_work import DECODE, PREFILL
from vlmr1.planner.time import DECODER, HEAD, OPTIMIZER, REFERENCE, TOWER, Work, count_work

DOCS = Path(__file__).parents[2] / "docs"
MODELS, LENGTHS, PROMPT = ("3B", "7B"), (256, 2048, 8192), {"image_tokens": 992, "text_tokens": 208}
COMMON: dict[str, Any] = {"bf16": True, "gradient_checkpointing": True, "beta": 0.04, "num_generations": 8}
COMMON |= {"prompts_per_device": 4, "tokens_per_pack": 16384}
NAIVE: dict[str, Any] = dict.fromkeys(("share_prompt", "share_vision", "pack"), False)
NAIVE |= {"rollout_engine": "transformers"}
POLICY = (TOWER, DECODER, HEAD)
Row = tuple[str, int, str]  # model, completion tokens, name of the settings


def settings_of(length: int) -> dict[str, dict[str, Any]]:
    """Settings by name; a group that exceeds the budget of a pack is split, unless the budget is raised."""
    group = sum(PROMPT.values()) + 8 * (length - 1)
    whole = {f"shared, tokens_per_pack={group}": {"tokens_per_pack": group}} if group > 16384 else {}
    return {"shared": {}, **whole, "nothing shared": NAIVE}


def rows() -> Iterator[tuple[Row, dict[str, Any]]]:
    for model in MODELS:
        for length in LENGTHS:
            for name, settings in settings_of(length).items():
                yield (model, length, name), settings


def counted(row: Row, settings: Mapping[str, Any]) -> Work:
    model, length, _ = row
    config = config_named(f"Qwen2.5-VL-{model}-Instruct")
    return count_work(job(config, **PROMPT, **(COMMON | {"max_completion_length": length, **settings})))


def times_of(work: Work, card: str) -> dict[str, float]:
    """Milliseconds by phase."""
    return {phase: sum(kinds.values()) for phase, kinds in work.milliseconds(CARDS[card]).items()}


def line(row: Row, work: Work) -> str:
    """A row of the table of docs/benchmarks.md."""
    ms = times_of(work, "h200")
    step = f"{ms[DECODE] / work.steps:.1f}"
    phases = [f"{ms.get(phase, 0) / 1e3:.2f}" for phase in (PREFILL, DECODE, REFERENCE, *POLICY, OPTIMIZER)]
    totals = [f"{sum(times_of(work, card).values()) / 1e3:.1f}" for card in ("h200", "h100", "a100")]
    model, length, name = row
    return f"| {' | '.join([model, f'{length:,}', name, *phases[:2], step, *phases[2:], *totals])} |"


HEAD_LINES = [
    "| model | tokens | | prefill | decode | ms a step | reference | tower | decoder | head, loss | optimizer | H200 | H100 | A100 |",  # noqa: E501
    "|---|--:|---|" + "--:|" * 11,
]


def saving(works: Mapping[Row, Work]) -> list[str]:
    """The table of docs/rollouts.md: seconds with nothing shared over seconds with all shared, on an H200."""
    lines = ["| model | tokens | settings | rollout | reference | update |", "|---|--:|---|--:|--:|--:|"]
    for (model, length, name), work in works.items():
        if name == "nothing shared":
            continue
        naive, ours = (times_of(each, "h200") for each in (works[model, length, "nothing shared"], work))
        cells = []
        for phases in ((PREFILL, DECODE), (REFERENCE,), (*POLICY, OPTIMIZER)):
            slow, fast = (sum(times.get(phase, 0) for phase in phases) / 1e3 for times in (naive, ours))
            cells.append(f"{slow:.1f} / {fast:.1f} s = {slow / fast:.1f}x")
        lines.append(f"| {model} | {length:,} | {name} | {' | '.join(cells)} |")
    return lines


def write(page: str, lines: list[str]) -> None:
    """Replace what is between the marks of a page."""
    path = DOCS / page
    begin, end = "<!-- predicted:begin -->", "<!-- predicted:end -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    table = "\n".join(lines)
    path.write_text(f"{before}{begin}\n\n{table}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    works = {}
    for row, settings in rows():
        works[row] = counted(row, settings)
        print(line(row, works[row]), flush=True)
    write("benchmarks.md", [*HEAD_LINES, *(line(row, work) for row, work in works.items())])
    write("rollouts.md", saving(works))


if __name__ == "__main__":
    sys.exit(main())
