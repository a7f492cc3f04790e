"""The section `step`: whole steps, switch by switch, and the peers' steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.suite import ablation
from benchmarks.suite.arms import TrainerArm, check, check_rollout
from benchmarks.suite.bed import Bed
from benchmarks.suite.context import Context
from benchmarks.suite.peers import Peers
from benchmarks.suite.samples import Sample, in_turn, peak_mib, row, sample
from vlmr1.errors import MemoryShort
from vlmr1.grpo.pack_budget import free_memory
from vlmr1_kernels import ImplementationError


def step(context: Context) -> dict[str, Any]:
    """The arms of the ablation in turn, the peers' with them or after them."""
    options = context.options
    tokens = context.bed().tokens
    rows = context.progress.arms
    with Peers(context, "step") as peers:
        samples = _in_turn(context, peers)
        if options.device == "cuda" and options.peers:
            context.drop_bed()
        for name in options.peers:
            base = "naive" if "naive" in rows else name
            own = samples[name] if name in samples else peers.alone(name, tokens, base)
            if own and (made := peers.row(name, own, tokens, base=base)) is not None:
                rows[name] = made
    return context.progress.section


def _in_turn(context: Context, peers: Peers) -> dict[str, list[Sample]]:
    """Makes the rows of our arms. The samples of all that were called in turn: on a CPU the peers too."""
    bed, options = context.bed(), context.options
    made, reasons = ablation.arms(options.device, bed.dtype, context.shape)
    context.skip("step", reasons)
    arms, figures = ready(context, "step", bed, made)
    calls: dict[str, Callable[[], Sample]] = {
        name: lambda arm=arm: sample(arm.step, context.joules, arm.phases) for name, arm in arms.items()
    }
    if options.device == "cpu":
        peers.launch(options.peers)
        for name in options.peers:
            peers.start(name)
        calls |= peers.arms(context.joules)

    def of_rounds(name: str, samples: Sequence[Sample]) -> dict[str, Any] | None:
        if name not in arms:
            return peers.of_rounds(name, samples, bed.tokens, "naive" if "naive" in arms else name)
        of, note = arms[name].arm, arms[name].note
        meta: dict[str, Any] = {"label": of.label, "base": of.base, "settings": of.settings, "note": note}
        return row(samples, tokens=bed.tokens, check=figures[name], **meta)

    kept = context.progress.rounds(of_rounds)
    samples = in_turn(context.told("step", calls), rounds=options.rounds, kept=kept)  # `ready` has made a step of each
    for name, arm in arms.items():
        peak = peak_mib(samples[name], arm.step)
        context.progress.arms[name] = {**(of_rounds(name, samples[name]) or {}), "peak_mib": peak}
    return samples


def ready(
    context: Context, section: str, bed: Bed, made: Mapping[str, ablation.Arm]
) -> tuple[dict[str, TrainerArm], dict[str, dict[str, float]]]:
    """The arms that have made a step here, and their checked figures. One that cannot is left out, and with a base the
    arms that are compared with it."""
    arms: dict[str, TrainerArm] = {}
    figures: dict[str, dict[str, float]] = {}
    for name, each in made.items():
        arm = TrainerArm(bed, each)
        reason = fits(
            lambda arm=arm, each=each: figures.update({arm.arm.name: arm.figures(bed.groups(flat=each.flat))})
        )
        if reason is None:
            arms[name] = arm
        else:
            context.skip(section, {name: reason})
    _without_base(context, section, arms)
    check({name: figures[name] for name in arms}, {name: arm.arm.base for name, arm in arms.items()}, bed.dtype)
    for name, arm in list(arms.items()):
        if (reason := fits(arm.step)) is not None:
            context.skip(section, {name: reason})
            del arms[name]
        else:
            check_rollout(name, arm)
    _without_base(context, section, arms)
    return arms, figures


def fits(call: Callable[[], Any]) -> str | None:
    """Calls; the reason where memory does not hold it, or where a kernel that is named refuses it."""
    try:
        call()
        return None
    except ImplementationError as error:
        return str(error)
    except (torch.OutOfMemoryError, MemoryShort) as error:
        reason = str(error).partition("\n")[0]
    free_memory()
    return f"out of memory: {reason}"


def _without_base(context: Context, section: str, arms: dict[str, TrainerArm]) -> None:
    """Arms whose base was left out are left out too; `all` is kept, as a base of its own."""
    for name in [name for name, arm in arms.items() if arm.arm.base not in arms]:
        if name == "all":
            arms[name].arm = replace(arms[name].arm, base=name)
            continue
        context.skip(section, {name: f"its base {arms[name].arm.base} was left out"})
        del arms[name]
