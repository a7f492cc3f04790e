"""A plan as text and as JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from vlmr1.errors import SettingError
from vlmr1.planner.plan import CAUSES, FRAMEWORK_CAUSE, GIB, Plan
from vlmr1.planner.remedies import Advice

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
    """ "80GiB", "80 GB", "24576MiB" -> bytes."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([MGT]i?B)\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise SettingError(f"gpu is {text!r}: a size is expected, as 80GiB or 24GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def table(plan: Plan) -> str:
    """A table of GiB by cause and phase, with the phase of the peak marked."""
    causes = [cause for cause in CAUSES if any(plan.phases[phase][cause] for phase in plan.phases)]
    head = ["GiB", *(f"{phase}{' *' if phase == plan.peak_phase else ''}" for phase in plan.phases)]
    rows = [[cause, *(gib(plan.phases[phase][cause]) for phase in plan.phases)] for cause in causes]
    rows.append(["together", *(gib(plan.total(phase)) for phase in plan.phases)])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for first, *others in [head, *rows]:
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
