"""Charts of a result of the suite, as PNG. The caption of each names the machine and the shape.

Colours are Okabe's and Ito's, which the colour-blind can tell apart; where colours alone would have to do, markers or
words say it too."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from statistics import median
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.suite.parts import number, speed
from benchmarks.suite.reading import OPS, Result
from benchmarks.suite.tables import ALL, NAIVE, workload
from vlmr1.report.curves import COLORS as SIX

COLORS = (*SIX, "#f0e442", "#444444")
PHASES = ("rollout", "reward", "reference", "old", "forward", "backward", "update")  # in the order of a step
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # not as many as colours, so that pairs repeat late
QUIET, GREY = "#5d6772", "#c8ccd1"
WIDTH, DPI = 9.0, 120
LABEL = 38  # letters of an arm's name on a line


def charts(result: Result) -> dict[str, bytes]:
    """PNG by name; a chart whose section is missing is left out."""
    sections = result["figures"]["sections"]
    makers: dict[str, Callable[[], Figure | None]] = {
        "ablation": lambda: ablation(sections["step"]["arms"]) if "step" in sections else None,
        "phases": lambda: phases(sections["step"]["arms"]) if "step" in sections else None,
        "grid": lambda: grid(sections["update"].get("grid")) if "update" in sections else None,
        "memory": lambda: memory(sections["memory"]["arms"]) if "memory" in sections else None,
        "ops": lambda: ceilings(sections["ops"], "Ops") if "ops" in sections else None,
        "attention": lambda: ceilings(sections["attention"], "Attention") if "attention" in sections else None,
    }
    made = {name: make() for name, make in makers.items()}
    return {name: png(figure, _caption(result, name)) for name, figure in made.items() if figure is not None}


def _caption(result: Result, name: str) -> str:
    """The machine, and the shape as far as the chart does not say it."""
    figures = result["figures"]
    if name == "grid":
        return f"{result['machine']}. Shape {figures['shape']}, {figures['dtype']}"
    if name in OPS:
        rates = figures["ceilings"]
        copied, product = number(rates["copy_gb_s"]), number(rates["matmul_tflop_s"])
        return f"{result['machine']}. Copy {copied} GB/s, matrix product in {figures['dtype']} {product} TFLOP/s"
    return f"{result['machine']}. {workload(result)}"


def png(figure: Figure, caption: str) -> bytes:
    figure.supxlabel(fill(caption, int(14 * figure.get_figwidth())), fontsize=7.5, color=QUIET)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def ablation(arms: Mapping[str, Any]) -> Figure | None:
    """A bar an arm: speed against its base, with the range over rounds."""
    shown = {name: arm for name, arm in arms.items() if arm["group"] == "ablation" and arm["base"] != name}
    if not shown:
        return None
    several = len({arm["base"] for arm in shown.values()}) > 1
    ratios = [speed(arms, name) for name in shown]
    figure = _figure(0.42 * _lines(shown, several, arms) + 1.6)
    axes = figure.add_subplot()
    places = range(len(shown))
    errors = [[each.value - each.low for each in ratios], [each.high - each.value for each in ratios]]
    # A median over a median may leave the range of the rounds' own ratios by a hair.
    errors = [[max(0.0, each) for each in side] for side in errors]
    colors = [COLORS[0] if name == ALL else COLORS[5] for name in shown]
    values = [each.value for each in ratios]
    axes.barh(places, values, xerr=errors, color=colors, ecolor="#333333", capsize=3, height=0.62)
    edge = max(max(each.high, each.value) for each in ratios)
    for place, each in zip(places, ratios, strict=True):
        axes.text(max(each.high, each.value) + 0.015 * edge, place, f"{each.value:.2f}", va="center", fontsize=9)
    axes.set_xlim(0, 1.1 * edge)
    axes.axvline(1, color="#333333", linewidth=1, linestyle="--")
    _names(axes, [_name(arms, name, several) for name in shown])
    _finish(axes, "Each switch against its base", "times as fast as the base (bar: medians; whisker: range of rounds)")
    return figure


def phases(arms: Mapping[str, Any]) -> Figure | None:
    """A stacked bar an arm: median seconds of each phase; what no phase covers is grey."""
    shown = {name: arm for name, arm in arms.items() if arm.get("phases")}
    if not shown:
        return None
    known = _ordered(phase for arm in shown.values() for phase in arm["phases"])
    times = {name: {k: median(v) if v else 0.0 for k, v in arm["phases"].items()} for name, arm in shown.items()}
    totals = [median(arm["seconds"]) for arm in shown.values()]
    scale, unit = (1.0, "s") if max(totals) >= 1 else (1e3, "ms")
    figure = _figure(0.42 * _lines(shown, False, arms) + 2.0)
    axes = figure.add_subplot()
    left = [0.0] * len(shown)
    for phase in known:
        widths = [scale * times[name].get(phase, 0.0) for name in shown]
        axes.barh(range(len(shown)), widths, left=left, height=0.66, color=_phase_color(phase, known), label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    rest = [max(0.0, scale * total - covered) for total, covered in zip(totals, left, strict=True)]
    if max(rest) > 0.002 * scale * max(totals):
        axes.barh(range(len(shown)), rest, left=left, height=0.66, color=GREY, label="between phases")
        left = [a + b for a, b in zip(left, rest, strict=True)]
    for place, (end, total) in enumerate(zip(left, totals, strict=True)):
        axes.text(end + 0.012 * max(left), place, f"{number(scale * total)} {unit}", va="center", fontsize=9)
    axes.set_xlim(0, 1.14 * max(left))
    _names(axes, [arm["label"] for arm in shown.values()])
    _finish(axes, "A step by phase", f"{unit} of a step, medians over rounds (phases of other trainers: of one step)")
    figure.legend(loc="outside upper center", ncols=4, fontsize=8.5, frameon=False)
    return figure


def grid(cells: Sequence[Mapping[str, Any]] | None) -> Figure | None:
    """Naive over all by group size: a line a prompt length, dashed what was predicted; a panel a completion length."""
    if not cells:
        return None
    lengths = sorted({cell["completion_tokens"] for cell in cells})
    prompts = sorted({cell["prompt_tokens"] for cell in cells})
    sizes = sorted({cell["num_generations"] for cell in cells})
    columns = min(3, len(lengths))
    rows = -(-len(lengths) // columns)
    figure = Figure(figsize=(max(8.0, 4.0 * columns), 3.6 * rows + 0.7), dpi=DPI, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for panel, (axes, length) in enumerate(zip(panels, lengths, strict=False)):
        for place, prompt in enumerate(prompts):
            line = [cell for cell in cells if (cell["prompt_tokens"], cell["completion_tokens"]) == (prompt, length)]
            line.sort(key=lambda cell: cell["num_generations"])
            if line:
                aside = 2 ** (0.03 * (place - (len(prompts) - 1) / 2))  # whiskers beside each other
                _ratio_line(axes, line, f"prompt {prompt}", place, aside)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.axhline(1, color="#333333", linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("time of naive / time of all" if panel % columns == 0 else "")
        _finish(axes, f"Completions of {length} tokens", "completions a group (G)", grid="both")
    for axes in panels[len(lengths) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    handles += panels[0].plot([], [], color=QUIET, linestyle="--")
    labels = [*labels, "predicted from counted matrix operations"]
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8.5, frameon=False)
    return figure


def _ratio_line(axes: Axes, line: Sequence[Mapping[str, Any]], label: str, place: int, aside: float) -> None:
    color, marker = COLORS[place % 6], MARKERS[place % 7]
    sizes = [aside * cell["num_generations"] for cell in line]
    values = [cell["ratio"]["value"] for cell in line]
    below = [max(0.0, cell["ratio"]["value"] - cell["ratio"]["low"]) for cell in line]
    above = [max(0.0, cell["ratio"]["high"] - cell["ratio"]["value"]) for cell in line]
    axes.errorbar(sizes, values, [below, above], color=color, marker=marker, capsize=3, linewidth=1.8, label=label)
    axes.plot(sizes, [cell["predicted"] for cell in line], color=color, linestyle="--", linewidth=1.2)


def memory(arms: Mapping[str, Any]) -> Figure | None:
    """Memory over one step, its phases shaded; naive and all on one scale of memory."""
    there = [name for name in (NAIVE, ALL) if name in arms] or list(arms)[:2]
    shown = {name: arms[name] for name in there if len(arms[name]["timeline"]) > 1}
    if not shown:
        return None
    known = _ordered(phase for arm in shown.values() for _, _, phase in arm["timeline"] if phase)
    figure = Figure(figsize=(WIDTH, 4.2), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True).flatten()
    for axes, arm in zip(panels, shown.values(), strict=True):
        times, mib, _ = zip(*arm["timeline"], strict=True)
        start, end = times[0], times[-1]
        for phase, first, last in _spans(arm["timeline"]):
            color = _phase_color(phase, known)
            axes.axvspan(first - start, last - start, color=color, alpha=0.28, linewidth=0)
            if last - first >= 0.16 * (end - start):  # others are named by the legend
                axes.text((first + last) / 2 - start, 0.985, phase, transform=axes.get_xaxis_transform(), **_INSIDE)
        axes.plot([each - start for each in times], mib, color="#222222", linewidth=1.4)
        axes.axhline(arm["peak_mib"], color="#222222", linewidth=0.8, linestyle=":")
        axes.set_xlim(0, end - start)
        title = f"{fill(arm['label'], 44)}\npeak {number(arm['peak_mib'])} MiB"
        _finish(axes, title, "seconds of the step (axes differ)", grid="y")
    highest = [max(arm["peak_mib"], *(mib for _, mib, _ in arm["timeline"])) for arm in shown.values()]
    panels[0].set_ylim(0, 1.15 * max(highest))
    panels[0].set_ylabel("MiB above what was held before")
    patches = [panels[0].fill_between([], [], color=_phase_color(phase, known), alpha=0.28) for phase in known]
    figure.legend(patches, known, loc="outside upper center", ncols=7, fontsize=8.5, frameon=False)
    return figure


_INSIDE: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8, "color": "#333333"}


def _spans(timeline: Sequence[Sequence[Any]]) -> list[tuple[str, float, float]]:
    """(phase, first second, last second) of stretches of one phase; each ends where the next begins."""
    spans: list[tuple[str, float, float]] = []
    starts: list[tuple[str, float]] = []
    for phase, points in groupby(timeline, key=lambda point: point[2]):
        starts.append((phase, next(points)[0]))
    ends = [start for _, start in starts[1:]] + [timeline[-1][0]]
    for (phase, start), end in zip(starts, ends, strict=True):
        if phase:
            spans.append((phase, start, end))
    return spans


def ceilings(cases: Mapping[str, Any], what: str) -> Figure | None:
    """A mark an arm: the share of the ceiling that it reaches, a band a case."""
    if not cases:
        return None
    names = list(dict.fromkeys(name for case in cases.values() for name in case["arms"]))
    lane = 0.135  # inches an arm
    height = sum(max(2, len(case["arms"])) * lane + 0.12 for case in cases.values())
    figure = _figure(height + 1.9)
    axes = figure.add_subplot()
    styles = {name: (COLORS[place % 6], MARKERS[place % 7]) for place, name in enumerate(names)}
    top, ticks, reached = 0.0, [], 1.0
    for band, case in enumerate(cases.values()):
        size = max(2, len(case["arms"])) * lane + 0.12
        if band % 2 == 0:
            axes.axhspan(top, top + size, color="#eef1f4", linewidth=0)
        ticks.append(top + size / 2)
        gap = (size - len(case["arms"]) * lane) / 2
        for place, (name, row) in enumerate(case["arms"].items()):
            color, marker = styles[name]
            axes.plot(
                row["ceiling_share"], top + gap + (place + 0.5) * lane, marker, color=color, markersize=6, clip_on=False
            )
            reached = max(reached, row["ceiling_share"])
        top += size
    axes.set_ylim(top, 0)
    axes.set_xlim(0, 1.05 * reached)
    axes.axvline(1, color="#333333", linewidth=1, linestyle="--")
    axes.set_yticks(ticks, [f"{case['op']}\n{case['case']}" for case in cases.values()], fontsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    title = f"{what}: share of the ceiling"
    _finish(axes, title, "least time for the FLOPs and bytes at measured rates, over the time it took (more is better)")
    handles = [axes.plot([], [], marker, color=color, label=name)[0] for name, (color, marker) in styles.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=6, fontsize=8.5, frameon=False)
    return figure


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, max(2.6, height)), dpi=DPI, layout="constrained")


def _finish(axes: Axes, title: str, xlabel: str, grid: Any = "x") -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.grid(axis=grid, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _names(axes: Axes, labels: Sequence[str]) -> None:
    """Names of bars, the first on top."""
    axes.set_yticks(range(len(labels)), [fill(label, LABEL) for label in labels], fontsize=9)
    axes.margins(y=0.02)
    axes.invert_yaxis()


def _name(arms: Mapping[str, Any], name: str, several: bool) -> str:
    base = arms[arms[name]["base"]]["label"]
    return f"{arms[name]['label']} (base: {base})" if several and arms[name]["base"] != NAIVE else arms[name]["label"]


def _lines(shown: Mapping[str, Any], several: bool, arms: Mapping[str, Any]) -> float:
    """Bars that the chart needs room for, one with a long name as more."""
    return sum(1 + 0.25 * fill(_name(arms, name, several), LABEL).count("\n") for name in shown)


def _ordered(found: Any) -> list[str]:
    known = list(dict.fromkeys(found))
    return sorted(known, key=lambda phase: PHASES.index(phase) if phase in PHASES else len(PHASES))


def _phase_color(phase: str, known: Sequence[str]) -> str:
    """The same for a phase in every chart."""
    order = [*PHASES, *(each for each in known if each not in PHASES)]
    return COLORS[order.index(phase) % len(COLORS)]
