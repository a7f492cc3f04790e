"""What makes a job fit: settings in the order of their price, the cheapest that suffice."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from vlmr1.config import GRPOConfig
from vlmr1.planner.inputs import PlanInputs
from vlmr1.planner.optimizer import KINDS
from vlmr1.planner.plan import Plan, Planner

WORTH = 0.01  # of the peak: what saves less is not named
SETTINGS = frozenset(field.name for field in fields(GRPOConfig))
# Left out of LoRA's remedies where there is no reference model.
ADAPTER = {"reference": "adapter"}


@dataclass(frozen=True)
class Remedy:
    """Settings of `vlmr1 train`, what they are to the planner, and their price other than memory."""

    settings: Mapping[str, Any]
    changes: Mapping[str, Any]
    price: str

    def __str__(self) -> str:
        return " ".join(f"--{name} {str(value).lower()}" for name, value in self.settings.items())

    def of(self, inputs: PlanInputs) -> PlanInputs:
        """The job with it."""
        changes = dict(self.changes)
        if inputs.reference == "none":
            changes.pop("reference", None)
        return replace(inputs, **changes)


@dataclass(frozen=True)
class Applied:
    """A remedy, and the bytes by which it lowers the peak after those before it."""

    remedy: Remedy
    saved: int


@dataclass(frozen=True)
class Advice:
    """Remedies in order, and the plan with all of them; `missing` is by how many bytes it does not fit, or 0."""

    applied: Sequence[Applied]
    plan: Plan
    missing: int


def remedies(inputs: PlanInputs) -> Iterator[Remedy]:
    """What this job has not done yet, by price; of a setting that comes twice the later value goes further."""
    group = inputs.prompt_tokens + inputs.num_generations * (inputs.max_completion_length - 1)
    whole = -(-group // 256) * 256
    gpu, plain = inputs.device == "cuda", KINDS[inputs.optim].width is None and KINDS[inputs.optim].states > 0
    if inputs.share_prompt and inputs.pack and whole < inputs.tokens_per_pack:
        yield _same("a group a pass: more passes, smaller ones", tokens_per_pack=whole)
    if inputs.rollout_engine == "native" and inputs.rollout_kv_mib is None:
        yield _same("in the rollout groups wait for room", rollout_kv_mib=2048.0)
    if gpu and plain and inputs.model_dtype == "float32":
        yield _same("optimizer states are rounded to 8 bits", optim="adamw_bnb_8bit")
        yield _same("optimizer states are rounded to 8 bits and wait in host memory", optim="paged_adamw_8bit")
    if gpu and inputs.reference == "copy":
        yield _same("the reference model crosses the bus in each step", reference="offload")
    if not inputs.gradient_checkpointing:
        yield _same("backward computes the forward again", gradient_checkpointing=True)
    if gpu and not inputs.activation_offload:
        yield _same("layer inputs cross the bus twice", gradient_checkpointing=True, activation_offload=True)
    if not (inputs.freeze_vision or inputs.use_peft):
        yield _same("the vision tower does not learn", freeze_vision=True)
    if inputs.reference != "none":
        yield Remedy({"beta": 0}, {"reference": "none"}, "nothing keeps the policy near the reference")
    if not inputs.use_peft:
        if gpu and plain and inputs.model_dtype == "float32":
            narrow = {"model_dtype": "bfloat16", "optim": "adamw_torch_8bit"}
            yield Remedy({**narrow, "stochastic_rounding": True}, narrow, "weights move by random rounding")
        yield Remedy({"use_peft": True}, {"use_peft": True, **ADAPTER}, "only adapters learn (LoRA)")
        lora = {"use_peft": True, "model_dtype": "bfloat16"}
        yield Remedy(lora, lora | ADAPTER, "only adapters learn, the frozen weights are rounded to bfloat16")
    if not inputs.load_in_4bit:
        four = {"use_peft": True, "model_dtype": "bfloat16", "load_in_4bit": True}
        yield Remedy(
            four,
            four | ({} if inputs.use_peft else ADAPTER),
            "only adapters learn, the frozen weights are rounded to 4 bits (QLoRA)",
        )
    if inputs.share_prompt and inputs.pack and inputs.prompt_tokens < 2048 < min(group, inputs.tokens_per_pack):
        yield _same("groups are split, their prompts computed again", tokens_per_pack=2048)
    if inputs.prompts_per_device > 1:
        yield _same("a smaller batch", prompts_per_device=1)


def _same(price: str, **settings: Any) -> Remedy:
    return Remedy(settings, settings, price)


def advise(planner: Planner, inputs: PlanInputs, room: int, settings: Collection[str] = SETTINGS) -> Advice:
    """The cheapest remedies with which the job fits in `room` bytes: applied by price until it does, then those left
    out without which it still does, the dearest first. Those that need a setting not in `settings` are not offered."""
    plan = planner.plan(inputs)
    kept: list[Remedy] = []
    for remedy in remedies(inputs):
        if plan.peak <= room:
            break
        if remedy.settings.keys() - set(settings):
            continue
        better = planner.plan(remedy.of(plan.inputs))
        if better.peak < (1 - WORTH) * plan.peak:
            kept, plan = [*kept, remedy], better
    if plan.peak <= room:
        for remedy in reversed(kept[:-1]):
            fewer = [each for each in kept if each is not remedy]
            without = planner.plan(_with(inputs, fewer))
            if without.peak <= room:
                kept, plan = fewer, without
    steps = [planner.plan(_with(inputs, kept[:count])).peak for count in range(len(kept) + 1)]
    applied = [Applied(remedy, steps[i] - steps[i + 1]) for i, remedy in enumerate(kept)]
    return Advice(applied, plan, max(0, plan.peak - room))


def _with(inputs: PlanInputs, remedies: Sequence[Remedy]) -> PlanInputs:
    for remedy in remedies:
        inputs = remedy.of(inputs)
    return inputs


def gpus_needed(planner: Planner, inputs: PlanInputs, room: int, most: int = 1024) -> int | None:
    """The fewest devices on which the job fits with ZeRO-3, at the same prompts a device; None: not on `most`."""
    fits = [n for n in _doubled(most) if planner.plan(replace(inputs, gpus=n, zero=3)).peak <= room]
    if not fits:
        return None
    high = fits[0]
    return next(n for n in range(high // 2 + 1, high + 1) if planner.plan(replace(inputs, gpus=n, zero=3)).peak <= room)


def _doubled(most: int) -> Iterator[int]:
    count = 2
    while count <= most:
        yield count
        count *= 2
