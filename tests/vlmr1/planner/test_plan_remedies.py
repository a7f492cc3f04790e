"""Remedies: in order of what they cost, as many as it takes, each accepted by `vlmr1 plan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.jobs import args_of
from vlmr1.errors import SettingError
from vlmr1.planner.job import Job
from vlmr1.planner.plan import GIB, Plan
from vlmr1.planner.remedies import Advice, advise, gpus_needed, remedies
from vlmr1.planner.report import bytes_of

DEFAULTS = {"num_generations": 4, "max_completion_length": 1, "tokens_per_pack": 16384, "prompts_per_device": 8}
ARGS = args_of(**DEFAULTS)


def changed(settings: Mapping[str, Any]) -> Any:
    """Settings that nothing checks."""
    return SimpleNamespace(**{**vars(ARGS), **settings})


def job_with(**settings: Any) -> Job:
    return Job(changed(settings), None)


JOB = job_with()


class Sums:
    """A planner whose peak is a sum of what each setting still costs, in GiB."""

    def __init__(self, **costs: Any):
        self.costs = costs

    def plan(self, job: Job) -> Plan:
        peak = 10.0
        for name, (value, cost) in self.costs.items():
            found = job.reference if name == "reference" else getattr(job.args, name)
            peak += cost if found == value else 0
        peak = 10 + (peak - 10) / (job.gpus if job.zero == 3 else 1)
        causes = {"weights": round(peak * GIB), "framework": 0}
        return Plan(job, {"policy": causes}, {}, 1, 1)


def advice_for(planner: Any, room: int, change: Any = changed) -> Advice:
    return advise(planner, JOB, room * GIB, change)


COSTS = {
    "tokens_per_pack": (16384, 4),
    "activation_checkpointing": (False, 30),
    "freeze_vision": (False, 8),
    "reference": ("copy", 14),
    "use_peft": (False, 40),
}
ROOMS = {
    "all of it": (106, [], 0),
    "packs": (102, ["tokens_per_pack"], 0),
    "reference to the host, packs not needed": (94, ["reference"], 0),
    "those, and packs": (88, ["tokens_per_pack", "reference"], 0),
    "checkpointing alone": (76, ["activation_checkpointing"], 0),
    "checkpointing and the reference": (63, ["reference", "activation_checkpointing"], 0),
    "frozen": (50, ["tokens_per_pack", "reference", "activation_checkpointing", "freeze_vision"], 0),
    "nothing": (9, ["tokens_per_pack", "reference", "activation_checkpointing", "freeze_vision", "use_peft"], 1),
}


@pytest.mark.parametrize(("room", "expected", "missing"), ROOMS.values(), ids=ROOMS.keys())
def test_the_cheapest_that_suffice(room, expected, missing):
    advice = advice_for(Sums(**COSTS), room)
    assert [next(iter(each.remedy.settings)) for each in advice.applied] == expected
    assert advice.missing == missing * GIB
    assert advice.plan.peak == 106 * GIB - sum(each.saved for each in advice.applied)


def test_each_says_what_it_saves_after_those_before_it():
    assert [each.saved // GIB for each in advice_for(Sums(**COSTS), 63).applied] == [14, 30]


def test_what_the_settings_refuse_is_not_offered():
    def change(settings: Mapping[str, Any]) -> Any:
        if "reference" in settings or "use_peft" in settings:
            raise SettingError("not here")
        return changed(settings)

    advice = advice_for(Sums(**COSTS), 9, change)
    kept = [next(iter(each.remedy.settings)) for each in advice.applied]
    assert kept == ["tokens_per_pack", "activation_checkpointing", "freeze_vision", "beta"]


def names_of(job: Job) -> list[str]:
    return [" ".join(remedy.settings) for remedy in remedies(job)]


def test_the_order_is_of_what_the_user_loses():
    assert names_of(JOB) == [
        "tokens_per_pack",
        "rollout_kv_mib",
        "optim",
        "optim",
        "reference",
        "activation_checkpointing",
        "activation_checkpointing activation_offload",
        "model_dtype stochastic_rounding optim reference",
        "freeze_vision",
        "beta",
        "use_peft",
        "use_peft model_dtype",
        "use_peft model_dtype load_in_4bit",
        "prompts_per_device",
    ]


def test_what_is_done_already_is_not_offered():
    done: dict[str, Any] = {"activation_checkpointing": True, "activation_offload": True, "use_peft": True, "beta": 0}
    done |= {"load_in_4bit": True, "model_dtype": "bfloat16", "optim": "paged_adamw_8bit"}
    assert names_of(job_with(**done, tokens_per_pack=1280, rollout_kv_mib=100.0)) == ["prompts_per_device"]


def test_a_cpu_is_offered_nothing_that_needs_a_gpu():
    names = " ".join(names_of(replace(JOB, device="cpu")))
    assert not {"optim", "reference", "activation_offload", "stochastic_rounding"} & set(names.split())


def test_optimizers_other_than_adamw_are_kept():
    assert not any("optim" in name for name in names_of(job_with(optim="lion_32bit")))
    assert "model_dtype stochastic_rounding optim reference" in names_of(job_with(optim="paged_adamw_32bit"))


def test_adapters_take_back_what_they_exclude():
    """Stochastic rounding, and a reference other than the policy without its adapter."""
    narrow = job_with(model_dtype="bfloat16", stochastic_rounding=True, optim="adamw_torch_8bit", reference="offload")
    lora = next(remedy for remedy in remedies(narrow) if "use_peft" in remedy.settings)
    assert lora.settings == {"use_peft": True, "stochastic_rounding": False, "reference": "auto"}
    no_reference = next(remedy for remedy in remedies(narrow) if "beta" in remedy.settings)
    assert no_reference.settings == {"beta": 0, "reference": "auto"}


@pytest.mark.parametrize(("room", "expected"), [(60, 2), (42, 3), (30, 5), (11, 96), (10, None)])
def test_gpus_with_zero_3(room, expected):
    """10 GiB that are not shared, and 96 that are."""
    assert gpus_needed(Sums(**COSTS), JOB, room * GIB) == expected  # type: ignore[arg-type]


SIZES = {"80GiB": 80 * 2**30, "24 GB": 24 * 10**9, "512mib": 512 * 2**20, "1.5TiB": 1.5 * 2**40}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["80", "0GiB", "many GiB", "-1GiB"])
def test_what_is_no_size(text):
    with pytest.raises(SettingError, match=r"gpu is .*80GiB"):
        bytes_of(text)
