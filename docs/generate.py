"""Hook of mkdocs: fill in the pages that are made from the code and from the list of refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from vlmr1.api.config import GRPOConfig
from vlmr1.api.refused import ARGUMENTS, REASONS
from vlmr1.commands.settings_help import TRL_DEFAULTS, default_text, help_text
from vlmr1.config import GRPOConfig as CoreConfig
from vlmr1.lifecycle.renamed import RENAMED, RENAMED_VALUES

REFUSALS = Path(__file__).parents[1] / "tests" / "golden" / "refusals.jsonl"
# Headings of the page of refusals, by where the check was when the list was made; the last one takes the rest.
PARTS = {
    "Data": ("vlmr1/data/",),
    "Rewards": ("vlmr1/rewards/",),
    "Models and parameters": ("vlmr1/models/", "vlmr1/parameters", "vlmr1/memory/settings", "vlmr1/memory/precision"),
    "Memory and the planner": ("vlmr1/memory/", "vlmr1/planner/"),
    "Evaluation": ("vlmr1/evaluation/",),
    "Several processes": (
        "vlmr1/scale/",
        "vlmr1/distributed/",
    ),
    "Kernels": ("kernels/",),
    "Settings, runs and checkpoints": ("vlmr1/",),
}


def settings() -> Iterator[str]:
    """One table for each group: name, default, TRL's default where it differs, help."""
    for group, names in CoreConfig.groups().items():
        yield f"\n## {group}\n\n| setting | default | TRL's default, if different | meaning |\n|---|---|---|---|"
        for name in names:
            other = f"`{TRL_DEFAULTS[name]}`" if name in TRL_DEFAULTS else ""
            yield f"| `{name}` | `{default_text(name)}` | {other} | {_cell(help_text(name))} |"


def renamed_settings() -> Iterator[str]:
    """A table of old spellings and the present ones."""
    yield "| old | now |\n|---|---|"
    yield from (f"| `{old}` | `{new}` |" for old, new in RENAMED.items())
    for name, values in RENAMED_VALUES.items():
        yield from (f"| `{name}={old}` | `{name}={new}` |" for old, new in values.items())


def refusals() -> Iterator[str]:
    """A table for each part of the project: the condition, and words that the message has."""
    entries = [json.loads(line) for line in REFUSALS.read_text(encoding="utf-8").splitlines()]
    parts: dict[str, list[dict]] = {part: [] for part in PARTS}
    for entry in entries:
        parts[next(part for part, places in PARTS.items() if entry["where"].startswith(places))].append(entry)
    for part, found in parts.items():
        yield f"\n## {part}\n\n| condition | the message names |\n|---|---|"
        for entry in found:
            yield f"| {_cell(entry['condition'])} | {', '.join(f'`{_cell(word)}`' for word in entry['words'])} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def refused_in_python() -> Iterator[str]:
    """A table of TRL's settings and arguments that are refused."""
    yield "| setting or argument | reason |\n|---|---|"
    yield from (f"| `{name}` | {_cell(reason)} |" for name, reason in (REASONS | ARGUMENTS).items())


def defaults_in_python() -> Iterator[str]:
    """A table of the defaults that differ between the Python API and the command line."""
    yield "| setting | Python and TRL | command line |\n|---|---|---|"
    for each in fields(GRPOConfig):
        other = CoreConfig.__dataclass_fields__.get(each.name)
        if each.init and other is not None and other.default != each.default:
            yield f"| `{each.name}` | `{each.default}` | `{other.default}` |"


MARKERS = {"<!-- refused in Python -->": refused_in_python, "<!-- defaults in Python -->": defaults_in_python}
MARKERS |= {"<!-- settings -->": settings, "<!-- renamed settings -->": renamed_settings, "<!-- refusals -->": refusals}


def on_page_markdown(markdown: str, **options: object) -> str:
    """Replace each marker by what is generated in its place."""
    for marker, rows in MARKERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, "\n".join(rows()))
    return markdown
