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


def offers(job: Job) -> dict[str, Any]:
    """Return a map from the cost of each remedy to its settings; a value is falsy if the remedy does not apply. If two
    remedies change the same setting, the later one saves more."""
    args, on_gpu, optim = job.args, job.device == "cuda", str(_value(job, "optim"))
    group, packs = -(-_group_tokens(job) // 256) * 256, args.share_prompt and args.pack
    limits_kv = args.rollout_engine == "native" and args.rollout_kv_mib is None
    smaller = packs and group < args.tokens_per_pack
    pages = on_gpu and optim in {*ADAMW, *ADAMW_8BIT, "paged_adamw_32bit"}
    paged = pages and {"optim": "paged_adamw_8bit"}
    on_host = {"reference": "offload"} if on_gpu and job.reference == "copy" else {}
    rounds = optim.removeprefix("paged_") in {*ADAMW, *ADAMW_8BIT, "adamw_32bit"}
    rounds = rounds and on_gpu and not args.use_peft and args.model_dtype == "float32"
    stochastic = {"model_dtype": "bfloat16", "stochastic_rounding": True, "optim": STOCHASTIC, **on_host}
    lora = {} if args.use_peft else {"use_peft": True, "stochastic_rounding": False, "reference": "auto"}
    narrow = {**lora, "model_dtype": "bfloat16"}
    splits = packs and job.prompt_tokens < 2048 < min(_group_tokens(job), args.tokens_per_pack)
    offloads = on_gpu and not job.offloads and {"activation_checkpointing": True, "activation_offload": True}
    four_bit = not args.load_in_4bit and {**narrow, "load_in_4bit": True}
    keeps = on_gpu and args.rollout_engine == "native" and {"rollout_keep_cache": False}
    return {
        "KV cache and CUDA graphs are made again in each rollout": keeps,
        "a group a pass: more passes, smaller ones": smaller and {"tokens_per_pack": group},
        "in the rollout groups wait for free KV blocks": limits_kv and {"rollout_kv_mib": 2048},
        "optimizer states are rounded to 8 bits": on_gpu and optim in ADAMW and {"optim": "adamw_bnb_8bit"},
        "optimizer states are rounded to 8 bits and are in host memory between steps": paged,
        "the reference model is copied to the GPU in each step": on_host,
        "backward computes the forward again": {"activation_checkpointing": True},
        "layer inputs are copied to host memory and back": offloads,
        "weights are bfloat16, and updates are rounded stochastically": rounds and stochastic,
        "the vision tower does not learn": not args.use_peft and {"freeze_vision": True},
        "nothing keeps the policy near the reference": job.reference != "none" and {"beta": 0, "reference": "auto"},
        "only adapters learn (LoRA)": lora,
        "only adapters learn, the frozen weights are rounded to bfloat16": narrow,
        "only adapters learn, the frozen weights are rounded to 4 bits (QLoRA)": four_bit,
        "groups are split, their prompts computed again": splits and {"tokens_per_pack": 2048},
        "a smaller batch": {"prompts_per_device": 1},
    }


def remedies(job: Job) -> Iterator[Remedy]:
    """Every remedy that changes this job, without settings that the job has already."""
    for cost, settings in offers(job).items():
        found = remedy_for(job, settings, cost)
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
    for cost in offers(job):
        if plan.peak <= room:
            break
        remedy = remedy_for(plan.job, offers(plan.job)[cost], cost)
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


def _value(job: Job, name: str) -> Any:
    value = getattr(job.args, name)
    return getattr(value, "value", value)
