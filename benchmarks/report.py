"""The report of a step result: tables for the terminal, and one HTML page with a chart.

python -m benchmarks report FILE.json
"""

from __future__ import annotations

import argparse
import io
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any

from jinja2 import Environment
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness import ratio, read_result, table

Result = Mapping[str, Any]
PAGE = Path(__file__).with_name("page.html")
OURS, OTHERS, BAR = "#0072b2", "#d55e00", "#56b4e9"


@dataclass(frozen=True)
class Part:
    """A table of the report."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="vlmr1 bench report")
    parser.add_argument("file", type=Path, help="result file of `vlmr1 bench`")
    options = parser.parse_args(words)
    print(f"{text(read(options.file))}\n\nwritten: {write_page(options.file)}")
    return 0


def read(path: Path) -> dict[str, Any]:
    """Read a result of the step benchmark."""
    return read_result(path, "step")


def text(result: Result) -> str:
    """Return the report as Markdown."""
    blocks = ["\n".join(f"- {name}: {value}" for name, value in about(result))]
    for part in parts(result):
        blocks += [f"## {part.title}", *filter(None, [part.note]), table(part.head, part.rows)]
    return "\n\n".join(blocks)


def write_page(path: Path) -> Path:
    """Write NAME.html beside NAME.json."""
    result = read(path)
    page = Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8"))
    chart, title = speed_chart(result["arms"]), f"{result['shape']} on {result['machine']}"
    encoded = b64encode(chart).decode() if chart else ""
    html = page.render(title=title, about=about(result), parts=parts(result), chart=encoded)
    out = path.with_suffix(".html")
    out.write_text(html, encoding="utf-8")
    return out


def about(result: Result) -> list[tuple[str, str]]:
    """Return what was run where."""
    stopped = "" if result["complete"] else "; it was stopped before its end, whole rounds were kept"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    run = f"{result['wall_seconds']:.0f} s, peak of the process tree {result['tree_peak_mib']:,.0f} MiB{stopped}"
    lines = {"work": f"{'rollouts' if result['rollout'] else 'steps'} of {workload(result)}", "run": run}
    lines |= {"machine": f"{result['machine']} ({result['device']})", "versions": versions}
    return [*lines.items(), *((name, result[name]) for name in ("commit", "command", "date"))]


def workload(result: Result) -> str:
    """Return the shape in one line."""
    sizes = result["sizes"]
    return (
        f"the {result['shape']} shape in {result['dtype']} ({sizes['parameters'] / 1e6:,.1f} million parameters, "
        f"{sizes['prompts']} prompts of {sizes['prompt_tokens']} tokens, {sizes['num_generations']} completions of "
        f"{sizes['completion_tokens']})"
    )


def parts(result: Result) -> list[Part]:
    """Return the tables that the result has figures for."""
    arms = result["arms"]
    made = [arms_part(arms), phases_part(arms), memory_part(arms), grid_part(result["grid"])]
    made.append(Part("Left out", ["arm", "reason"], [list(item) for item in result["skipped"].items()]))
    return [part for part in made if part.rows]


def arms_part(arms: Mapping[str, Any]) -> Part:
    """Each arm against its base."""
    head = ["arm", "base", "times as fast", "ms", "range", "tokens/s", "peak MiB", "planned MiB"]
    rows = []
    for name, row in arms.items():
        seconds, own = row["seconds"], row["base"] == name
        value, low, high = speeds(arms, row)
        cells = ["-", "1"] if own else [row["base"], f"{value:.2f} ({low:.2f}..{high:.2f})"]
        cells += [number(1e3 * median(seconds)), f"{number(1e3 * min(seconds))}..{number(1e3 * max(seconds))}"]
        planned = max(row["planned_mib"].values()) if "planned_mib" in row else None
        cells += [number(row["tokens"] / median(seconds)), _mib(row.get("peak_mib")), _mib(planned)]
        rows.append([row["label"], *cells])
    note = "Speed: ratio of medians, and its range over rounds. Memory: above what a process holds between steps."
    return Part("Arms", head, rows, note)


def speeds(arms: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Return (base's median over own, lowest and highest of a round)."""
    base, own = arms[row["base"]]["seconds"], row["seconds"]
    rounds = [a / b for a, b in zip(base, own, strict=True)]
    return ratio(base, own), min(rounds), max(rounds)


def phases_part(arms: Mapping[str, Any]) -> Part:
    """Median milliseconds of each phase."""
    timed = [row for row in arms.values() if row.get("phases")]
    known = list(dict.fromkeys(phase for row in timed for phase in row["phases"]))
    cells = [[number(1e3 * median(row["phases"].get(phase, [0.0]))) for phase in known] for row in timed]
    rows = [[row["label"], *of] for row, of in zip(timed, cells, strict=True)]
    return Part("A step by phase, ms", ["arm", *known], rows)


def memory_part(arms: Mapping[str, Any]) -> Part:
    """Measured and planned peak of each phase."""
    names, rows = ("rollout", "reference", "policy", "update"), []  # of the planner
    for row in (row for row in arms.values() if "memory_by_phase" in row):
        measured, planned = row["memory_by_phase"], row["planned_mib"]
        found = {**measured, "policy": max(measured.get(phase, 0.0) for phase in ("forward", "backward"))}
        rows.append([row["label"], *(f"{_mib(found.get(name))} / {_mib(planned.get(name))}" for name in names)])
    note = "Measured / planned; MiB above what the process holds between steps."
    return Part("Memory by phase", ["arm", *names], rows, note)


def grid_part(cells: Sequence[Mapping[str, Any]]) -> Part:
    """Naive over all by group size and prompt length."""
    rows = []
    for cell in cells:
        found = ratio(cell["seconds"]["naive"], cell["seconds"]["all"])
        rows.append([str(cell["prompt_tokens"]), str(cell["num_generations"]), f"{found:.2f}"])
    return Part("Other sizes", ["prompt tokens", "G", "time of naive over time of all"], rows)


def number(value: float) -> str:
    """Return about three digits, never an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def speed_chart(arms: Mapping[str, Any]) -> bytes | None:
    """Return a PNG: a bar an arm, times as fast as its base, with the range over rounds."""
    shown = {name: row for name, row in arms.items() if row["base"] != name}
    if not shown:
        return None
    found = [speeds(arms, row) for row in shown.values()]
    figure = Figure(figsize=(9, 0.45 * len(shown) + 1.4), dpi=120, layout="constrained")
    axes, values = figure.add_subplot(), [value for value, _, _ in found]
    # A median over a median may leave the range of the rounds' own ratios by a hair.
    errors = [[max(0.0, v - low) for v, low, _ in found], [max(0.0, high - v) for v, _, high in found]]
    colors = [OURS if name == "all" else OTHERS if row["group"] == "peer" else BAR for name, row in shown.items()]
    axes.barh(range(len(shown)), values, xerr=errors, color=colors, capsize=3, height=0.62)
    for place, (value, _, high) in enumerate(found):
        axes.text(max(value, high) + 0.02 * max(values), place, f"{value:.2f}", va="center", fontsize=9)
    labels = [fill(f"{row['label']} / {row['base']}", 44) for row in shown.values()]
    axes.set_yticks(range(len(shown)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.axvline(1, color="#333333", linewidth=1, linestyle="--")
    axes.set_xlabel("times as fast as the base (bar: medians; whisker: range of rounds)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
