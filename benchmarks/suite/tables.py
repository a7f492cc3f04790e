"""The parts of a report with their Markdown tables, made from a result of the suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.suite.parts import (
    Column,
    Part,
    Table,
    faster,
    milliseconds,
    number,
    of_columns,
    percent,
    spread,
    times,
    tokens_a_second,
)
from benchmarks.suite.reading import OPS, Result, unfinished
from benchmarks.summary import HEAD, case_rows

ALL, NAIVE = "all", "naive"
TITLES = {
    "rollout": "Rollout",
    "update": "Update: reference, forward, backward",
    "ops": "Ops",
    "attention": "Attention",
}


def parts(result: Result) -> list[Part]:
    """What was measured, in reading order; sections that did not run are left out."""
    sections = result["figures"]["sections"]
    made = [head(result)]
    if "step" in sections:
        made += [ablation(result), *([peers(result)] if _names(result, "step", "peer") else []), phases(result)]
    makers: dict[str, Callable[[Result], Part]] = {"rollout": rollout, "update": update}
    made += [make(result) for name, make in makers.items() if name in sections]
    if sections.get("update", {}).get("grid"):
        made.append(grid(result))
    if "memory" in sections:
        made.append(memory(result))
    made += [ops(result, name) for name in OPS if name in sections]
    return [*made, *ending(result)]


def head(result: Result) -> Part:
    """Machine, versions, shape; what the figures are."""
    figures = result["figures"]
    ceilings = figures["ceilings"]
    rates = f"copy {number(ceilings['copy_gb_s'])} GB/s, matrix product {number(ceilings['matmul_tflop_s'])} TFLOP/s"
    lines = {
        "machine": f"{result['machine']} ({figures['device']}, {figures['threads']} threads)",
        "driver": figures.get("driver"),
        "shape": workload(result),
        "ceilings measured in this run": rates,
        "rounds": f"{figures['rounds']} (of ops at least 5, of the grid at most 3), each arm being warm",
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "commit": result["commit"],
        "command": result["command"],
        "date": result["date"],
    }
    notes = [
        "Arms are called in turn in one run. Speeds and times against another arm are ratios of medians, in "
        "parentheses the lowest and highest ratio of a round. Absolute figures are those of this machine: "
        f"{result['machine']}."
    ]
    if figures["device"] == "cpu":
        notes.append("Measured without a GPU: nothing here says how fast a GPU would be.")
    if (stopped := unfinished(result)) is not None:
        notes.append(f"This run was {stopped}. Here is what was measured until then.")
    if figures["quick"]:
        notes.append("A quick run: small sizes, few rounds, rough figures.")
    return Part("head", "The run", notes, points=[f"{name}: {text}" for name, text in lines.items() if text])


def workload(result: Result) -> str:
    """The shape in one line."""
    figures, sizes = result["figures"], result["figures"]["sizes"]
    return (
        f"{figures['shape']}, {figures['dtype']}, {sizes['parameters'] / 1e6:,.1f} million parameters, "
        f"{sizes['prompts']} prompts of {sizes['prompt_tokens']} tokens ({sizes['image_tokens']} of an image) "
        f"x {sizes['num_generations']} completions of {sizes['completion_tokens']}"
    )


def ablation(result: Result) -> Part:
    """Each switch against its base."""
    arms, names = result["figures"]["sections"]["step"]["arms"], _names(result, "step", "ablation")
    note = (
        "A whole step: images and prompts from their files, rollout, reward, reference, policy, backward, optimizer. "
        "Each arm against its base."
    )
    points = [text for name in names for text in _about(arms, name)]
    table = arm_table(arms, names, _measured(arms))
    return Part("ablation", "What each switch does", [note], [table], points, ["ablation"])


def peers(result: Result) -> Part:
    """Other trainers' steps beside ours: times as long as `all` takes."""
    arms, others = result["figures"]["sections"]["step"]["arms"], _names(result, "step", "peer")
    ours = [name for name in (ALL, NAIVE) if name in arms]
    names = [*ours, *others]
    columns: dict[str, Column] = {}
    if ALL in arms:
        columns["time, x all's"] = lambda name: "1" if name == ALL else times(arms, name, ALL)
        columns["peak memory, x all's"] = lambda name: _over(arms, name, ALL)
    columns |= {"ms": lambda name: number(milliseconds(arms[name]))}
    columns |= {title: each for title, each in _measured(arms).items() if title != "peak memory, x base's"}
    note = (
        "The step by other trainers, each as it does it: images and prompts from their files, rollout, reward, "
        "reference, policy, backward, optimizer. Their phases are of one step."
    )
    points = [text for name in others for text in _about(arms, name)]
    return Part("peers", "Other trainers", [note], [of_columns("arm", names, _labels(arms), columns)], points)


def phases(result: Result) -> Part:
    """Median milliseconds of each phase of a step."""
    arms = {name: arm for name, arm in result["figures"]["sections"]["step"]["arms"].items() if arm.get("phases")}
    known = list(dict.fromkeys(phase for arm in arms.values() for phase in arm["phases"]))

    def column(phase: str) -> Column:
        return lambda arm: number(1e3 * median(arms[arm]["phases"][phase])) if arms[arm]["phases"].get(phase) else None

    columns = {f"{phase}, ms": column(phase) for phase in known}
    tables = [of_columns("arm", list(arms), _labels(arms), columns)] if arms else []
    notes = ["Medians over rounds."] if arms else []
    if any(arm["group"] == "peer" for arm in arms.values()):
        notes = ["Medians over rounds; of other trainers one further step, so that it need not add up to their time."]
    return Part("phases", "A step by phase", notes, tables, charts=["phases"])


def rollout(result: Result) -> Part:
    return _timed(result, "rollout", "floor: the time to read the weights once a decode step, over the time it took.")


def update(result: Result) -> Part:
    note = "utilization: FLOPs of the model over time, against a large matrix product in the same run."
    return _timed(result, "update", note)


def _timed(result: Result, section: str, note: str) -> Part:
    arms = result["figures"]["sections"][section]["arms"]
    points = [text for name in arms for text in _about(arms, name)]
    return Part(section, TITLES[section], [note], [arm_table(arms, list(arms), _measured(arms))], points)


def grid(result: Result) -> Part:
    """Group size by prompt and completion length: naive / all in time, range, prediction."""
    cells = result["figures"]["sections"]["update"]["grid"]
    entries = [
        (
            f"{cell['prompt_tokens']} x {cell['completion_tokens']}",
            cell["num_generations"],
            f"{cell['ratio']['value']:.2f} ({cell['ratio']['low']:.2f}..{cell['ratio']['high']:.2f}), "
            f"{cell['predicted']:.2f}",
        )
        for cell in cells
    ]
    note = "Time of naive over time of all (lowest..highest of a round), then the ratio of counted matrix operations."
    return Part("grid", "Over group size and prompt", [note], [pivot("prompt x completion", entries)], charts=["grid"])


def pivot(first: str, entries: Sequence[tuple[str, int, str]]) -> Table:
    """A line for each name, a column for each group size."""
    sizes = sorted({size for _, size, _ in entries})
    lines: dict[str, dict[int, str]] = {}
    for name, size, text in entries:
        lines.setdefault(name, {})[size] = text
    rows = [[name, *(of.get(size, "") for size in sizes)] for name, of in lines.items()]
    return Table([first, *(f"G {size}" for size in sizes)], rows)


def memory(result: Result) -> Part:
    """Peak of each phase of one step."""
    arms = result["figures"]["sections"]["memory"]["arms"]
    known = list(dict.fromkeys(phase for arm in arms.values() for phase in arm["phases"]))

    def column(phase: str) -> Column:
        return lambda arm: number(arms[arm]["phases"][phase]) if phase in arms[arm]["phases"] else None

    columns: dict[str, Column] = {"peak MiB": lambda arm: number(arms[arm]["peak_mib"])}
    if NAIVE in arms:
        columns["x naive's"] = lambda arm: _over(arms, arm, NAIVE)
    columns |= {f"{phase}, MiB": column(phase) for phase in known}
    note = "One step; MiB above what was held before it."
    return Part("memory", "Memory", [note], [of_columns("arm", list(arms), _labels(arms), columns)], charts=["memory"])


def ops(result: Result, section: str) -> Part:
    cases = result["figures"]["sections"][section]
    rows = [row for case in cases.values() for row in case_rows(case["op"], case["case"], case)]
    note = (
        "x floor: time against the matrix products (or reads) alone. of ceiling: the least time that FLOPs and bytes "
        "need at the rates of a large product and a large copy, over the time it took."
    )
    charts = ["ops"] if section == "ops" else ["attention"]
    return Part(section, TITLES[section], [note], [Table(HEAD, rows)], charts=charts)


def ending(result: Result) -> list[Part]:
    """What was left out, and how long the run took."""
    figures, made = result["figures"], []
    names: dict[str, list[str]] = {}  # by reason: many arms share one
    for name, reason in _skipped(figures).items():
        names.setdefault(reason, []).append(name)
    if names:
        points = [f"{reason}: {', '.join(of)}" for reason, of in names.items()]
        made.append(Part("skipped", "Left out", points=points))
    if figures.get("section_seconds"):
        took = figures["section_seconds"]
        rows = [[name, f"{seconds:.0f}"] for name, seconds in {**took, "together": sum(took.values())}.items()]
        made.append(Part("seconds", "Time of the run", tables=[Table(["section", "s"], rows)]))
    return made


def _skipped(figures: Mapping[str, Any]) -> dict[str, str]:
    """Why, by SECTION or SECTION/ARM; arms of op cases too."""
    cases = {
        f"{section}/{key}/{arm}": why.removeprefix(f"{case['op']}: ")
        for section in OPS
        for key, case in figures["sections"].get(section, {}).items()
        for arm, why in case.get("skipped", {}).items()
    }
    return dict(figures.get("skipped", {})) | cases


def arm_table(arms: Mapping[str, Any], names: Sequence[str], more: Mapping[str, Column]) -> Table:
    """Speed against the base first, then what this machine needed."""
    columns: dict[str, Column] = {}
    if len({arms[name]["base"] for name in names}) > 1:
        columns["base"] = lambda name: None if _own(arms, name) else arms[arms[name]["base"]]["label"]
    columns["speed, x base's"] = lambda name: "1" if _own(arms, name) else faster(arms, name)
    columns["ms"] = lambda name: number(milliseconds(arms[name]))
    return of_columns("arm", names, _labels(arms), columns | dict(more))


def _measured(arms: Mapping[str, Any]) -> dict[str, Column]:
    """Columns of what a machine needed; those that nobody measured vanish in `of_columns`."""

    def share(key: str) -> Column:
        return lambda name: percent(arms[name][key]) if arms[name].get(key) is not None else None

    return {
        "20..80 % of ms": lambda name: spread(arms[name]["seconds"], 1e3),
        "tokens/s": lambda name: number(tokens_a_second(arms[name])),
        "peak memory, x base's": lambda name: _over(arms, name, arms[name]["base"]),
        "peak MiB": lambda name: number(arms[name]["peak_mib"]) if "peak_mib" in arms[name] else None,
        "J a call": lambda name: number(median(arms[name]["energy_joules"])) if _joules(arms[name]) else None,
        "utilization": share("utilization"),
        "of floor": share("floor_share"),
    }


def _joules(arm: Mapping[str, Any]) -> bool:
    return bool(arm.get("energy_joules"))


def _over(arms: Mapping[str, Any], name: str, other: str) -> str | None:
    """Peak memory against another arm's."""
    own, base = arms[name].get("peak_mib"), arms[other].get("peak_mib")
    if own is None or not base:
        return None
    return "1" if name == other else f"{own / base:.2f}"


def _about(arms: Mapping[str, Any], name: str) -> list[str]:
    """Settings that an arm changes, and its note."""
    arm = arms[name]
    changed = ", ".join(f"{key}={_setting(value)}" for key, value in arm["settings"].items())
    alone = _own(arms, name) or arm["group"] == "peer"
    words = [f"{changed} on top of {arms[arm['base']]['label']}"] if changed and not alone else [changed]
    words = [each for each in (*words, arm.get("note", "")) if each]
    return [f"{arm['label']}: {'; '.join(words)}"] if words else []


def _setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _own(arms: Mapping[str, Any], name: str) -> bool:
    return arms[name]["base"] == name


def _labels(arms: Mapping[str, Any]) -> dict[str, str]:
    return {name: arm["label"] for name, arm in arms.items()}


def _names(result: Result, section: str, group: str) -> list[str]:
    arms = result["figures"]["sections"][section]["arms"]
    return [name for name, arm in arms.items() if arm["group"] == group]
