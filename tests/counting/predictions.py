"""The tables of predicted time in docs/: python -m tests.counting.predictions writes them.

Each row is `vlmr1 plan --time` for one model, completion length and set of settings. Time is linear in the numbers of
decoder layers and of tower blocks with windows and without, so that models of one or two layers are counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from tests.helpers.jobs import job
from vlmr1.planner.cards import CARDS
from vlmr1.planner.known_models import config_named
from vlmr1.planner.rollout_work import DECODE, PREFILL
from vlmr1.planner.time import DECODER, HEAD, OPTIMIZER, REFERENCE, TOWER, count_work

DOCS = Path(__file__).parents[2] / "docs"
MODELS, LENGTHS, PROMPT = ("3B", "7B"), (256, 2048, 8192), {"image_tokens": 992, "text_tokens": 208}
COMMON: dict[str, Any] = {"bf16": True, "gradient_checkpointing": True, "beta": 0.04, "num_generations": 8}
COMMON |= {"prompts_per_device": 4, "tokens_per_pack": 16384}
UNSHARED = "nothing shared"
NAIVE: dict[str, Any] = dict.fromkeys(("share_prompt", "share_vision", "pack"), False)
NAIVE |= {"rollout_engine": "transformers", "fused_layers": "torch"}
POLICY = (TOWER, DECODER, HEAD)
ONE_MORE = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))  # decoder layers, blocks with windows, blocks without
Row = tuple[str, int, str]  # model, completion tokens, name of the settings
Times = dict[str, dict[str, float]]  # milliseconds by card and phase


def settings_of(length: int) -> dict[str, dict[str, Any]]:
    """Settings by name; a group that exceeds the budget of a pack is split, unless the budget is raised."""
    group = sum(PROMPT.values()) + 8 * (length - 1)
    whole = {f"shared, tokens_per_pack={group}": {"tokens_per_pack": group}} if group > 16384 else {}
    return {"shared": {}, **whole, UNSHARED: NAIVE}


def rows() -> Iterator[tuple[Row, dict[str, Any]]]:
    for model in MODELS:
        for length in LENGTHS:
            for name, settings in settings_of(length).items():
                yield (model, length, name), settings


def counted(config: Any, length: int, settings: Mapping[str, Any]) -> Times:
    work = count_work(job(config, **PROMPT, **(COMMON | {"max_completion_length": length, **settings})))
    return {
        name: {phase: sum(kinds.values()) for phase, kinds in work.milliseconds(card).items()}
        for name, card in CARDS.items()
    }


def predicted(row: Row, settings: Mapping[str, Any]) -> Times:
    """The times of a whole model, from those of models with few layers."""
    config, length = config_named(f"Qwen2.5-VL-{row[0]}-Instruct"), row[1]
    full = len(config.vision_config.fullatt_block_indexes)
    layers = config.get_text_config().num_hidden_layers, config.vision_config.depth - full, full
    first, *others = (counted(with_layers(config, *each), length, settings) for each in ONE_MORE)
    return {
        card: {
            phase: ms + sum((n - 1) * (other[card][phase] - ms) for n, other in zip(layers, others, strict=True))
            for phase, ms in phases.items()
        }
        for card, phases in first.items()
    }


def with_layers(config: Any, decoder: int, windowed: int, full: int) -> Any:
    """The configuration with so many layers and blocks."""
    config = deepcopy(config)
    text, vision = config.get_text_config(), config.vision_config
    text.num_hidden_layers, text.layer_types = decoder, ["full_attention"] * decoder
    vision.depth, vision.fullatt_block_indexes = windowed + full, list(range(windowed, windowed + full))
    return config


def line(row: Row, times: Times) -> str:
    """A row of the table of docs/benchmarks.md."""
    model, length, name = row
    ms = times["h200"]
    step = f"{ms[DECODE] / (length - 1):.1f}"
    phases = [f"{ms.get(phase, 0) / 1e3:.2f}" for phase in (PREFILL, DECODE, REFERENCE, *POLICY, OPTIMIZER)]
    totals = [f"{sum(times[card].values()) / 1e3:.1f}" for card in ("h200", "h100", "a100")]
    return f"| {' | '.join([model, f'{length:,}', name, *phases[:2], step, *phases[2:], *totals])} |"


COLUMNS = ("model", "tokens", "", "prefill", "decode", "ms a step", "reference", "tower", "decoder", "head, loss")
COLUMNS += ("optimizer", "H200", "H100", "A100")
HEAD_LINES = [f"| {' | '.join(COLUMNS)} |", "|---|--:|---|" + "--:|" * 11]


def savings(times: Mapping[Row, Times]) -> list[str]:
    """The table of docs/rollouts.md: seconds with nothing shared, and with all shared, on an H200."""
    lines = ["| model | tokens | settings | rollout | reference | update |", "|---|--:|---|--:|--:|--:|"]
    for (model, length, name), ours in times.items():
        if name == UNSHARED:
            continue
        cells = []
        for phases in ((PREFILL, DECODE), (REFERENCE,), (*POLICY, OPTIMIZER)):
            both = times[model, length, UNSHARED], ours
            slow, fast = (sum(each["h200"].get(phase, 0) for phase in phases) / 1e3 for each in both)
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
    times = {}
    for row, settings in rows():
        times[row] = predicted(row, settings)
        print(line(row, times[row]), flush=True)
    write("benchmarks.md", [*HEAD_LINES, *(line(row, each) for row, each in times.items())])
    write("rollouts.md", savings(times))


if __name__ == "__main__":
    sys.exit(main())
