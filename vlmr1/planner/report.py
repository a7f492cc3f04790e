"""A plan as text and as JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from vlmr1.errors import SettingError
from vlmr1.planner.cards import CARDS, GRAPH_US, LAUNCH_US, MEMORY_REACHES, PRODUCTS_REACH, Card
from vlmr1.planner.plan import CAUSES, FRAMEWORK_CAUSE, GIB, Plan
from vlmr1.planner.remedies import Advice
from vlmr1.planner.time import DECODE, KINDS, Work

# Settings in the JSON beside the job's own fields.
SETTINGS = ("prompts_per_device", "steps_per_generation", "num_generations", "max_completion_length", "tokens_per_pack")
SETTINGS += ("share_vision", "share_prompt", "pack", "rollout_engine", "rollout_kv_mib", "repetition_penalty")
SETTINGS += ("rollout_keep_cache", "cuda_graphs")
SETTINGS += ("kernels",)
SETTINGS += ("model_dtype", "bf16", "optim", "freeze_vision", "freeze_merger", "activation_checkpointing")
SETTINGS += ("activation_offload", "fused_layers", "use_peft", "lora_r", "lora_target_modules", "lora_vision")
SETTINGS += ("lora_modules_to_save", "use_dora", "lora_merge_rollout", "load_in_4bit")
UNITS = {"MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def bytes_of(text: str) -> int:
    """ "80GiB", "80 GB", "24576MiB", "h100" -> bytes."""
    if text.lower() in CARDS:
        return int(CARDS[text.lower()].memory * GIB)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([MGT]i?B)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise SettingError(f"gpu is {text!r}: a size is expected, as 80GiB or 24GB, or one of {', '.join(CARDS)}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def table(plan: Plan) -> str:
    """A table of GiB by cause and phase, with the phase of the peak marked."""
    causes = [cause for cause in CAUSES if any(plan.phases[phase][cause] for phase in plan.phases)]
    head = ["GiB", *(f"{phase}{' *' if phase == plan.peak_phase else ''}" for phase in plan.phases)]
    rows = [[cause, *(gib(plan.phases[phase][cause]) for phase in plan.phases)] for cause in causes]
    rows.append(["together", *(gib(plan.total(phase)) for phase in plan.phases)])
    return _aligned([head, *rows])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def report(plan: Plan, advice: Advice, name: str, room: int, needed: int | None) -> str:
    """The text that `vlmr1 plan` prints."""
    job, args = plan.job, plan.job.args
    lines = [
        f"{name}: {plan.parameters / 1e9:.2f} billion parameters, {plan.trained / 1e9:.2f} trained",
        f"{args.prompts_per_device} prompts of {job.prompt_tokens} tokens ({job.image_tokens} of an image) x "
        f"{args.num_generations} completions of {args.max_completion_length} on a device, all at full length",
        _source(plan),
        "",
        table(plan),
        "",
        *_verdict(plan, advice, room),
    ]
    if any(plan.host.values()):
        lines.append("in host memory: " + ", ".join(f"{gib(size)} GiB {c}" for c, size in plan.host.items() if size))
    if needed is not None:
        lines.append(f"with ZeRO-3 these settings fit on {needed} such GPUs")
    return "\n".join(lines)


def _source(plan: Plan) -> str:
    allowance = plan.phases[plan.peak_phase][FRAMEWORK_CAUSE]
    rest = f"; {gib(allowance)} GiB is an allowance for what CUDA and its libraries hold" if allowance else ""
    return f"computed from shapes, not measured{rest}"


def _verdict(plan: Plan, advice: Advice, room: int) -> Sequence[str]:
    peak = f"the peak is {gib(plan.peak)} GiB, in {plan.peak_phase}; there are {gib(room)}"
    if plan.peak <= room:
        return [f"It fits: {peak}."]
    lines = [f"It does not fit: {peak}."]
    if advice.missing:
        what = " with all of these:" if advice.applied else ""
        lines.append(f"Nothing fits: it misses by {gib(advice.missing)} GiB{what}")
    else:
        after = f"{gib(advice.plan.peak)} GiB, in {advice.plan.peak_phase}"
        lines.append(f"It fits with these, the cheapest first ({after}):")
    for applied in advice.applied:
        lines.append(f"  {applied.remedy}  saves {gib(applied.saved)} GiB; {applied.remedy.cost}")
    return lines


def as_json(plan: Plan, advice: Advice, name: str, room: int, needed: int | None) -> dict[str, Any]:
    """The figures of the report in bytes."""
    job = {field.name: getattr(plan.job, field.name) for field in fields(plan.job) if field.repr}
    settings = {name: getattr(plan.job.args, name) for name in SETTINGS} | {"reference": plan.job.reference}
    settings["optim"] = getattr(settings["optim"], "value", settings["optim"])
    return {
        "model": name,
        "computed": "from shapes, not measured",
        "inputs": job | settings,
        "parameters": plan.parameters,
        "trained": plan.trained,
        "phases": plan.phases,
        "host": plan.host,
        "peak": {"phase": plan.peak_phase, "bytes": plan.peak},
        "gpu_bytes": room,
        "fits": plan.peak <= room,
        "remedies": [
            {"settings": dict(each.remedy.settings), "saves": each.saved, "cost": each.remedy.cost}
            for each in advice.applied
        ],
        "with_remedies": {"phases": advice.plan.phases, "peak": advice.plan.peak, "missing": advice.missing},
        "gpus_with_zero_3": needed,
    }


def card_named(name: str, device: str = "cuda") -> Card:
    """The ceilings of a GPU; SettingError for a size, or another device."""
    if device != "cuda":
        raise SettingError(f"time is predicted for GPUs: --device {device} has no ceilings")
    if name.lower() not in CARDS:
        raise SettingError(f"time needs the ceilings of a GPU: --gpu {', '.join(CARDS)}; it is {name!r}")
    return CARDS[name.lower()]


NOT_PREDICTED = "data loading, rewards, transfers between host and GPUs, communication between GPUs, "
NOT_PREDICTED += "Python beside launches"


def time_report(work: Work, name: str) -> str:
    """Predicted milliseconds by phase and kind of kernel, with what is assumed and what is left out."""
    card, args = card_named(name), work.job.args
    found = work.milliseconds(card)
    together = {kind: sum(times[kind] for times in found.values()) for kind in KINDS}
    rows = [["ms", "products", "attention", "others", "together"]]
    for phase, times in [*found.items(), ("together", together)]:
        rows.append([phase, *(f"{each:,.1f}" for each in (*times.values(), sum(times.values())))])
    kernels = sum(work.kernels[DECODE].values())
    step = sum(found[DECODE].values()) / max(1, work.steps)
    updates = args.updates_per_generation * args.num_iterations
    return "\n".join(
        [
            f"predicted time on {name.lower()}, arithmetic on counted FLOPs and bytes, not measured; "
            f"one generation of {work.job.prompts} prompts, updates: {updates}",
            "",
            _aligned(rows),
            "",
            f"decode: {work.steps} steps of {step:.2f} ms at the mean length, {kernels:,} kernels each",
            f"assumed: {PRODUCTS_REACH * card.bf16:.0f} TFLOP/s of bfloat16 products, {card.attention:g} of attention, "
            f"{MEMORY_REACHES * card.bandwidth:,.0f} GB/s",
            f"a kernel takes at least {LAUNCH_US:g} us, in a CUDA graph {GRAPH_US:g} us",
            f"not predicted: {NOT_PREDICTED}",
        ]
    )


def time_as_json(work: Work, name: str) -> dict[str, Any]:
    """The figures of `time_report`, with FLOPs and bytes of each phase; of decoding also those of one step."""
    card = card_named(name)
    return {
        "computed": "arithmetic on counted FLOPs and bytes, not measured",
        "gpu": name.lower(),
        "ceilings": asdict(card) | {"products_reach": PRODUCTS_REACH, "memory_reaches": MEMORY_REACHES},
        "launch_us": {"graph": GRAPH_US, "other": LAUNCH_US},
        "decode_steps": work.steps,
        "milliseconds": work.milliseconds(card),
        "work": {phase: work.totals(phase) for phase in work.kernels},
    }
