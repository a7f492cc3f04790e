"""The section `update`: reference, forward and backward of fixed groups; the peers'; and a grid over group and prompt.

Utilization is the arm's matrix operations, counted from its tokens (`benchmarks.flops`, what checkpointing computes
again left out), over its time and the rate of a large matrix product in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from statistics import median
from typing import Any

from benchmarks.attention import DTYPES
from benchmarks.flops import update_flops
from benchmarks.harness import CheckFailed, ratio, require_equal
from benchmarks.model import Shape
from benchmarks.suite import ablation
from benchmarks.suite.ablation import Arm
from benchmarks.suite.arms import TOLERANCE, TrainerArm, check
from benchmarks.suite.context import Context
from benchmarks.suite.peers import Check, Peers
from benchmarks.suite.samples import Sample, in_turn, peak_mib, row, sample
from benchmarks.suite.step import fits

GRIDS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {  # group sizes, sides of the image in pixels
    "tiny": ((2, 4, 8), (56, 224)),
    "bench": ((2, 4, 8), (224, 448)),
    "3b": ((2, 8), (448, 896)),
    "7b": ((2, 8), (448, 896)),
}
GRID_ROUNDS = 3
WITHOUT_NAIVE = "its base naive was left out"


def update(context: Context) -> dict[str, Any]:
    """Naive, repeated prompts with the fast kernels, everything, and the peers; then the grid."""
    options = context.options
    tokens = context.bed().tokens
    rows = context.progress.arms
    with Peers(context, "update") as peers:
        samples = _in_turn(context, peers)
        if options.device == "cuda" and options.peers:
            context.drop_bed()
        if not rows:
            context.skip("update", dict.fromkeys(options.peers, WITHOUT_NAIVE))
            return context.progress.section
        check = objections(rows["naive"]["check"], options.dtype)
        for name in options.peers:
            own = samples[name] if name in samples else peers.alone(name, tokens, "naive", check)
            if own and (made := peers.row(name, own, tokens, base="naive")) is not None:
                rows[name] = made
    return context.progress.section


def _in_turn(context: Context, peers: Peers) -> dict[str, list[Sample]]:
    """Makes the rows of our arms, and the grid. The samples of all that were called in turn: on a CPU the peers too."""
    bed, options = context.bed(), context.options
    groups = bed.groups()
    arms = {name: TrainerArm(bed, each) for name, each in chosen(context).items()}
    figures: dict[str, dict[str, float]] = {}
    for name in list(arms):
        if (reason := fits(lambda name=name: figures.update({name: arms[name].figures(groups)}))) is not None:
            context.skip("update", {name: reason})
            del arms[name]
    if "naive" not in arms:
        context.skip("update", dict.fromkeys(arms, WITHOUT_NAIVE))
        return {}
    check(figures, dict.fromkeys(figures, "naive"), bed.dtype)
    calls: dict[str, Callable[[], Sample]] = {
        name: lambda arm=arm: sample(lambda: arm.update(groups), context.joules, arm.phases, before=arm.enter)
        for name, arm in arms.items()
    }
    if options.device == "cpu":
        peers.launch(options.peers)
        for name in options.peers:
            peers.start(name, objections(figures["naive"], options.dtype))
        calls |= peers.arms(context.joules)
    rate = 1e12 * context.ceilings.matmul_tflop_s

    def of_rounds(name: str, samples: Sequence[Sample]) -> dict[str, Any] | None:
        if name not in arms:
            return peers.of_rounds(name, samples, bed.tokens, "naive")
        arm = arms[name]
        flops = update_flops(bed.model.config, arm.trainer.runner.packs(groups), reference=True)
        share = flops / median(each.seconds for each in samples) / rate
        meta: dict[str, Any] = {"label": arm.arm.label, "settings": arm.arm.settings, "note": arm.note}
        return row(samples, tokens=bed.tokens, base="naive", utilization=share, check=figures[name], **meta)

    kept = context.progress.rounds(of_rounds)
    samples = in_turn(context.told("update", calls), rounds=options.rounds, kept=kept)  # figures were made of each
    for name, arm in arms.items():
        peak = peak_mib(samples[name], lambda arm=arm: arm.update(groups), before=arm.enter)
        context.progress.arms[name] = {**(of_rounds(name, samples[name]) or {}), "peak_mib": peak}
    measured_grid(context, arms)
    return samples


def chosen(context: Context) -> dict[str, Arm]:
    """The arms of the update; rollouts have no part in it."""
    made = ablation.arms(context.options.device, context.bed().dtype, context.shape)[0]
    everything = made["all"]
    fast = {op: name for op, name in everything.kernels.items() if name != "reference"}
    config = {**ablation.NAIVE, "pack": True}
    label, said = "repeated: packed rows, fast kernels, nothing shared", {"pack": True, "kernels": _said(fast)}
    repeated = Arm("repeated", label, "naive", said, config, everything.kernels)
    return {"naive": made["naive"], "repeated": repeated, "all": everything}


def _said(kernels: Mapping[str, str]) -> str:
    return ",".join(f"{op}={impl}" for op, impl in kernels.items())


def objections(naive: Mapping[str, float], dtype: str) -> Check:
    """Says why a peer is not timed: its update is another one."""

    def objection(found: Mapping[str, float]) -> str | None:
        try:
            require_equal({"naive": naive, "it": found}, TOLERANCE[DTYPES[dtype]])
        except CheckFailed as error:
            return f"not the same update: {error}"
        return None

    return objection


def measured_grid(context: Context, arms: Mapping[str, TrainerArm]) -> None:
    """Cells over group size and prompt length, naive and all; first both must agree, which warms them up."""
    cells = context.progress.section.setdefault("grid", [])
    sizes, sides = GRIDS[context.shape_name]
    both = {name: arms[name] for name in ("naive", "all") if name in arms}
    for size, side in product(sizes, sides) if len(both) == 2 else ():
        shape = replace(context.shape, num_generations=size, image_px=side)
        found = _cell(context, both, shape)
        if isinstance(found, str):
            context.skip("update", {f"grid {size} x {side} px": found})
            continue
        cells.append(found)
        value, predicted = found["ratio"]["value"], found["predicted"]
        tokens = found["prompt_tokens"]
        context.print(f"update/grid G {size}, prompt {tokens}: naive/all {value:.2f}, predicted {predicted:.2f}")


def _cell(context: Context, arms: Mapping[str, TrainerArm], shape: Shape) -> dict[str, Any] | str:
    bed = context.bed()
    groups = bed.groups(shape=shape)
    figures: dict[str, dict[str, float]] = {}
    for name, arm in arms.items():
        if reason := fits(lambda name=name, arm=arm: figures.update({name: arm.figures(groups)})):
            return reason
    require_equal(figures, TOLERANCE[bed.dtype])
    calls = {
        n: lambda arm=arm: sample(lambda: arm.update(groups), context.joules, before=arm.enter)
        for n, arm in arms.items()
    }
    samples = in_turn(calls, rounds=min(GRID_ROUNDS, context.options.rounds))
    seconds = {name: [each.seconds for each in of] for name, of in samples.items()}
    flops = {
        n: update_flops(bed.model.config, arm.trainer.runner.packs(groups), reference=True) for n, arm in arms.items()
    }
    return {
        "num_generations": shape.num_generations,
        "prompt_tokens": len(groups[0].prompt.input_ids),
        "image_tokens": (shape.image_px // 28) ** 2,
        "completion_tokens": shape.completion_length,
        "seconds": seconds,
        "ratio": asdict(ratio(seconds, "naive", "all")),
        "predicted": flops["naive"] / flops["all"],
    }
