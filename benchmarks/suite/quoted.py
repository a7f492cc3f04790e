"""Tables and sentences that the READMEs quote from result files of the benchmarks beside the suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import fill
from typing import Any

from benchmarks.harness import table
from benchmarks.suite.reading import Result

MEMORY_HEAD = ["settings", "peak MiB", "in phase", "of base"]
ARMS = ("native", "reference", "eager", "compile", "trl", "liger")  # of the table with peers, in its order


def source(result: Result, *words: str) -> str:
    """Where figures come from, in one line."""
    named = {name: result["versions"].get(name) for name in ("torch", "transformers")}
    versions = [f"{name} {version}" for name, version in named.items() if version is not None]
    return "; ".join([result["machine"], *words, ", ".join([*versions, f"commit {result['commit']}"])])


def _under(text: str, result: Result, *words: str) -> str:
    """The table with its source below."""
    return f"{text}\n\n{source(result, *words)}"


def step(result: Result) -> str:
    """One update against shared: naive and TRL."""
    figures = result["figures"]
    trl = f"TRL {short(result, 'trl')}, same weights, completions and loss"
    rows = [["shared", "1", "1"]]
    for arm, name in (("naive", "naive: all sharing off"), ("trl", trl)):
        time, memory = figures[f"time {arm}/shared"], figures[f"memory {arm}/shared"]
        rows.append([name, times(time), f"{memory:.1f}x"])
    head = ["arm", "time against shared (range)", "peak memory against shared"]
    return _under(table(head, rows), result, f"medians of {len(figures['seconds']['shared'])}")


def scaling(result: Result) -> str:
    """Naive over shared, of `benchmarks.scaling`."""
    cells = result["figures"]["cells"]
    counts = sorted({len(samples) for cell in cells for samples in cell["seconds"].values()})
    return _under(pivot(cells), result, f"medians of {counts[0]} to {counts[-1]} samples a cell and arm")


def pivot(cells: Sequence[Mapping[str, Any]]) -> str:
    """A line for each prompt and completion length, a column for each group size: time, predicted, memory."""
    sizes = sorted({cell["generations"] for cell in cells})
    lines: dict[tuple[int, int], dict[int, str]] = {}
    for cell in cells:
        figures = f"{cell['time']['value']:.2f} ({cell['predicted']:.2f}), {cell['memory']:.1f}"
        lines.setdefault((cell["prompt"], cell["completion"]), {})[cell["generations"]] = figures
    rows = [[f"{prompt} x {length}", *(of.get(size, "") for size in sizes)] for (prompt, length), of in lines.items()]
    return table(["prompt x completion", *(f"G {size}" for size in sizes)], rows)


def agreement(result: Result) -> str:
    """How far apart reward curves are, of `benchmarks.agreement`."""
    figures = result["figures"]
    apart, spread = figures["naive to shared"], figures["naive to naive"]
    steps = len(next(iter(figures["curves"]["naive"].values())))
    return fill(
        f"Over {steps} GRPO steps of the tiny model the reward curves of a naive and a shared run with the same seed "
        f"are {min(apart.values()):.4f} to {max(apart.values()):.4f} apart, those of two naive runs with different "
        f"seeds {min(spread.values()):.3f} to {max(spread.values()):.3f} (root mean square over windows of "
        f"{figures['window']} steps, rewards up to 2; {len(apart)} seeds).",
        120,
    )


def plan(result: Result) -> str:
    """How far the planned peak is from the measured one, of `benchmarks.plan`."""
    off = [abs(shape["ratio"] - 1) for shape in result["figures"]["shapes"].values()]
    return fill(
        f"Against real runs on a CPU (resident memory, {len(off)} shapes) the plan is within {max(off):.0%}, within "
        f"3% in {sum(each <= 0.03 for each in off)} of them.",
        120,
    )


def rollout(result: Result) -> str:
    """Rollouts, and steps against TRL's."""
    figures = result["figures"]
    memory = figures["peak_mib"]["trl"] / figures["peak_mib"]["vlmr1"]
    return fill(
        f"The native engine draws {times(figures['rollout transformers/native'])} the tokens a second of `generate` on "
        "the repeated prompt; a whole step (rollout, reward, reference, policy, backward, optimizer) takes TRL "
        f"{short(result, 'trl')} {times(figures['step trl/vlmr1'])} as long, with {memory:.1f}x the peak memory "
        f"(medians of {len(figures['rollout_seconds']['native'])}).",
        120,
    )


def memory(result: Result) -> str:
    """Peak of a whole update, setting by setting, of `benchmarks.memory`."""
    return _under(table(MEMORY_HEAD, memory_rows(result["figures"]["peak_mib"])), result, "once each")


def memory_rows(found: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A line an arm: its peak, the phase that it is in, and the share of the first arm's."""
    peaks = {name: max(of.values()) for name, of in found.items()}
    phases = {name: max(of, key=lambda phase: of[phase]) for name, of in found.items()}
    base = next(iter(peaks.values()))
    return [[name, f"{peak:.0f}", phases[name], f"{peak / base:.2f}"] for name, peak in peaks.items()]


def head_op(result: Result) -> str:
    """`linear_grpo_loss` by case: native and eager."""
    rows, before = [], ["", ""]
    for case, found in result["figures"]["cases"].items():
        sizes, dtype, mode = case.split("-")
        named = [" x ".join(f"{int(size):,}" for size in sizes.split("x")), dtype]
        told = ["" if named[: place + 1] == before[: place + 1] else named[place] for place in range(2)]
        arms = [found["arms"][name] for name in ("native", "eager")]
        values = [f"{arm['time/floor']['value']:.2f}" for arm in arms] + [f"{arm['extra_mib']:.1f}" for arm in arms]
        rows.append([*told, {"trainable": "trained"}.get(mode, mode), *values])
        before = named
    head = ["N x D x V", "dtype", "head", "native, x floor", "eager, x floor", "native, MiB", "eager, MiB"]
    return _under(table(head, rows), result, f"medians of {result['figures']['rounds']}")


def head_op_peers(result: Result) -> str:
    """`linear_grpo_loss` with peers, a pair of columns a dtype."""
    cases = result["figures"]["cases"]
    labels = {
        "compile": "torch.compile of eager",
        "trl": f"TRL {short(result, 'trl')}, chunked",
        "liger": f"Liger {result['versions']['liger-kernel']}, fused linear GRPO",
    }
    head, rows = [""], [[labels.get(name, name)] for name in ARMS]
    for case, found in cases.items():
        head += [f"{case.split('-')[1]}, x floor", "MiB"]
        for row, name in zip(rows, ARMS, strict=True):
            arm = found["arms"][name]
            row += [f"{arm['time/floor']['value']:.2f}", f"{arm['extra_mib']:.1f}"]
    return _under(table(head, rows), result, f"medians of {result['figures']['rounds']}")


def times(ratio: Mapping[str, float]) -> str:
    return f"{ratio['value']:.1f}x ({ratio['low']:.1f} to {ratio['high']:.1f})"


def short(result: Result, package: str) -> str:
    """Major and minor version."""
    return ".".join(result["versions"][package].split(".")[:2])


QUOTED: dict[str, Callable[[Result], str]] = {
    "step-update": step,
    "scaling": scaling,
    "agreement": agreement,
    "plan": plan,
    "rollout-engines": rollout,
    "memory-settings": memory,
    "linear_grpo_loss": head_op,
    "linear_grpo_loss-peers": head_op_peers,
}
