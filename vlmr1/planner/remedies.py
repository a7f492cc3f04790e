"""Settings that make a job fit, in the order of what the user loses by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmr1.errors import SettingError
from vlmr1.models.precision import STOCHASTIC
from vlmr1.planner.job import Job
from vlmr1.planner.plan import Plan, Planner

Settings = Mapping[str, Any]
Change = Callable[[Settings], Any]  # settings that differ -> the settings of a run, or SettingError
WORTH = 0.01  # of the peak: what saves less is not named
ADAMW = {"adamw_torch", "adamw_torch_fused"}
ADAMW_8BIT = {"adamw_bnb_8bit", "adamw_8bit", STOCHASTIC}


@dataclass(frozen=True)
class Remedy:
    """Settings of `vlmr1 train`, and what they cost other than memory."""

    settings: Settings
    cost: str

    def __str__(self) -> str:
        return " ".join(f"--{name} {str(value).lower()}" for name, value in self.settings.items())


@dataclass(frozen=True)
class Applied:
    """A remedy, and the bytes that it saves when those before it are applied."""

    remedy: Remedy
    saved: int


@dataclass(frozen=True)
class Advice:
    """Remedies in order, the plan with all of them, and the number of bytes by which it does not fit, or 0."""

    applied: Sequence[Applied]
    plan: Plan
    missing: int


def _one_group_a_pack(job: Job) -> Settings | None:
    args, tokens = job.args, -(-_group_tokens(job) // 256) * 256
    return {"tokens_per_pack": tokens} if args.share_prompt and args.pack and tokens < args.tokens_per_pack else None


def _kv_budget(job: Job) -> Settings | None:
    limited = job.args.rollout_engine != "native" or job.args.rollout_kv_mib is not None
    return None if limited else {"rollout_kv_mib": 2048}


def _8bit_states(job: Job) -> Settings | None:
    return {"optim": "adamw_bnb_8bit"} if job.device == "cuda" and _optim(job) in ADAMW else None


def _paged_states(job: Job) -> Settings | None:
    known = {*ADAMW, *ADAMW_8BIT, "paged_adamw_32bit"}
    return {"optim": "paged_adamw_8bit"} if job.device == "cuda" and _optim(job) in known else None


def _reference_on_host(job: Job) -> Settings | None:
    return {"reference": "offload"} if job.device == "cuda" and job.reference == "copy" else None


def _checkpointing(job: Job) -> Settings | None:
    return None if job.args.activation_checkpointing else {"activation_checkpointing": True}


def _checkpoints_on_host(job: Job) -> Settings | None:
    if job.device != "cuda" or job.offloads:
        return None
    return {"activation_checkpointing": True, "activation_offload": True}


def _bfloat16_weights(job: Job) -> Settings | None:
    adamw = _optim(job).removeprefix("paged_") in {*ADAMW, *ADAMW_8BIT, "adamw_32bit"}
    if job.device != "cuda" or job.args.use_peft or job.args.model_dtype != "float32" or not adamw:
        return None
    narrow = {"model_dtype": "bfloat16", "stochastic_rounding": True, "optim": STOCHASTIC}
    return {**narrow, **(_reference_on_host(job) or {})}


def _frozen_vision(job: Job) -> Settings | None:
    return None if job.args.freeze_vision or job.args.use_peft else {"freeze_vision": True}


def _no_reference(job: Job) -> Settings | None:
    return None if job.reference == "none" else {"beta": 0, "reference": "auto"}


def _lora(job: Job) -> Settings | None:
    if job.args.use_peft:
        return None
    return {"use_peft": True, "stochastic_rounding": False, "reference": "auto"}


def _narrow_lora(job: Job) -> Settings | None:
    known = job.args.use_peft and job.args.model_dtype != "float32"
    return None if known else {**(_lora(job) or {}), "model_dtype": "bfloat16"}


def _qlora(job: Job) -> Settings | None:
    return None if job.args.load_in_4bit else {**(_lora(job) or {}), "model_dtype": "bfloat16", "load_in_4bit": True}


def _split_groups(job: Job) -> Settings | None:
    args = job.args
    splits = job.prompt_tokens < 2048 < min(_group_tokens(job), args.tokens_per_pack)
    return {"tokens_per_pack": 2048} if args.share_prompt and args.pack and splits else None


def _one_prompt(job: Job) -> Settings | None:
    return {"prompts_per_device": 1} if job.args.prompts_per_device > 1 else None


# What a remedy costs, and its settings for a job that has not got it; of a setting that comes twice the later value
# goes further.
REMEDIES: Sequence[tuple[str, Callable[[Job], Settings | None]]] = (
    ("a group a pass: more passes, smaller ones", _one_group_a_pack),
    ("in the rollout groups wait for free KV blocks", _kv_budget),
    ("optimizer states are rounded to 8 bits", _8bit_states),
    ("optimizer states are rounded to 8 bits and are in host memory between steps", _paged_states),
    ("the reference model is copied to the GPU in each step", _reference_on_host),
    ("backward computes the forward again", _checkpointing),
    ("layer inputs are copied to host memory and back", _checkpoints_on_host),
    ("weights are bfloat16, and updates are rounded stochastically", _bfloat16_weights),
    ("the vision tower does not learn", _frozen_vision),
    ("nothing keeps the policy near the reference", _no_reference),
    ("only adapters learn (LoRA)", _lora),
    ("only adapters learn, the frozen weights are rounded to bfloat16", _narrow_lora),
    ("only adapters learn, the frozen weights are rounded to 4 bits (QLoRA)", _qlora),
    ("groups are split, their prompts computed again", _split_groups),
    ("a smaller batch", _one_prompt),
)


def remedies(job: Job) -> Iterator[Remedy]:
    """Every remedy that changes this job, without settings that the job has already."""
    for cost, settings in REMEDIES:
        found = remedy_for(job, settings(job), cost)
        if found is not None:
            yield found


def remedy_for(job: Job, settings: Settings | None, cost: str) -> Remedy | None:
    """Return a remedy of the settings that the job does not have; None where it has them all."""
    missing = {name: value for name, value in (settings or {}).items() if _value(job, name) != value}
    return Remedy(missing, cost) if missing else None


def advise(planner: Planner, job: Job, room: int, change: Change) -> Advice:
    """Return the cheapest remedies with which the job fits in `room` bytes.

    They are applied in order until it fits. Then those that are not needed are left out, the most expensive first.
    Settings that `change` refuses are not offered."""

    def planned(chosen: Sequence[Remedy]) -> Plan | None:
        changed = {name: value for remedy in chosen for name, value in remedy.settings.items()}
        try:
            return planner.plan(replace(job, args=change(changed)) if changed else job)
        except SettingError:  # these settings exclude one another, or need what is not installed
            return None

    plan = planner.plan(job)
    kept: list[Remedy] = []
    for cost, settings in REMEDIES:
        if plan.peak <= room:
            break
        remedy = remedy_for(plan.job, settings(plan.job), cost)
        better = planned([*kept, remedy]) if remedy else None
        if remedy and better and better.peak < (1 - WORTH) * plan.peak:
            kept, plan = [*kept, remedy], better
    if plan.peak <= room:
        for remedy in reversed(kept[:-1]):
            fewer = [each for each in kept if each is not remedy]
            without = planned(fewer)
            if without and without.peak <= room:
                kept, plan = fewer, without
    return Advice(_one_by_one(planner.plan(job), kept, planned), plan, max(0, plan.peak - room))


def _one_by_one(
    plan: Plan, kept: Sequence[Remedy], planned: Callable[[Sequence[Remedy]], Plan | None]
) -> list[Applied]:
    """Bytes that each remedy saves when those before it are applied, without settings that the job has by then."""
    applied = []
    for count, remedy in enumerate(kept, 1):
        after, needed = planned(kept[:count]), remedy_for(plan.job, remedy.settings, remedy.cost)
        if after and needed:
            applied.append(Applied(needed, plan.peak - after.peak))
            plan = after
    return applied


def gpus_needed(planner: Planner, job: Job, room: int, most: int = 1024) -> int | None:
    """Smallest number of devices on which the job fits with ZeRO-3, at the same prompts a device; None above `most`."""

    def fits(count: int) -> bool:
        return planner.plan(replace(job, gpus=count, zero=3)).peak <= room

    doubled = [2**i for i in range(1, most.bit_length()) if 2**i <= most]
    high = next((count for count in doubled if fits(count)), None)
    return None if high is None else next(count for count in range(high // 2 + 1, high + 1) if fits(count))


def _group_tokens(job: Job) -> int:
    return job.prompt_tokens + job.args.num_generations * (job.args.max_completion_length - 1)


def _optim(job: Job) -> str:
    return str(_value(job, "optim"))


def _value(job: Job, name: str) -> Any:
    value = getattr(job.args, name)
    return getattr(value, "value", value)
