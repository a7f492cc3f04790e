"""The section `memory`: one step an arm, its peak by phase, and memory over time."""

from __future__ import annotations

from typing import Any

from benchmarks.heap import returned_at_once
from benchmarks.suite import ablation
from benchmarks.suite.arms import TrainerArm
from benchmarks.suite.context import Context
from benchmarks.suite.step import fits
from benchmarks.suite.timeline import timeline
from vlmr1.telemetry.peaks import PEAKS


def memory(context: Context) -> dict[str, Any]:
    """The arms that are compared with naive."""
    bed = context.bed()
    made = ablation.arms(context.options.device, bed.dtype, context.shape)[0]
    rows = context.progress.arms
    for name, each in made.items():
        if each.base != "naive":
            continue
        arm = TrainerArm(bed, each)
        # The first step of an arm also makes what stays: the optimizer's moments, a kernel's binary.
        reason = fits(arm.step) or fits(lambda name=name, arm=arm: rows.update({name: measured(arm)}))
        if reason is not None:
            context.skip("memory", {name: reason})
            continue
        context.print(f"memory/{name}: {rows[name]['peak_mib']:.0f} MiB")
    return context.progress.section


def measured(arm: TrainerArm) -> dict[str, Any]:
    """Of one step: peak, peak of each phase and the samples between, all above what was held before, in MiB."""
    arm.trainer.args.memory_by_phase = True
    with returned_at_once():
        PEAKS.lap()
        before, points = timeline(arm.step, lambda: arm.trainer.phase)
    arm.trainer.args.memory_by_phase = False
    phases = {phase: mib - before for phase, mib in arm.trainer.phases.memory.items() if phase != "old"}
    peak = max([*phases.values(), *(mib for _, mib, _ in points)])
    return {"label": arm.arm.label, "peak_mib": peak, "phases": phases, "timeline": [list(point) for point in points]}
