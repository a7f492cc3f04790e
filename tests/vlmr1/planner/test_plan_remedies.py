"""Remedies: in order of price, as many as it takes, each of a setting that there is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vlmr1.config import GRPOConfig
from vlmr1.errors import SettingError
from vlmr1.planner.inputs import PlanInputs
from vlmr1.planner.plan import CAUSES, GIB, Plan
from vlmr1.planner.remedies import advise, gpus_needed, remedies
from vlmr1.planner.report import bytes_of, report

INPUTS = PlanInputs(None, num_generations=4, max_completion_length=1, optim="adamw_torch_fused")
EVERY = {name for remedy in remedies(INPUTS) for name in remedy.settings}


class Sums:
    """A planner whose peak is a sum of what each setting still costs, in GiB."""

    def __init__(self, **costs: Any):
        self.costs = costs
        self.asked: list[PlanInputs] = []

    def plan(self, inputs: PlanInputs) -> Plan:
        self.asked.append(inputs)
        peak = 10.0
        for name, (value, cost) in self.costs.items():
            peak += cost if getattr(inputs, name) == value else 0
        peak = 10 + (peak - 10) / (inputs.gpus if inputs.zero == 3 else 1)
        causes = {"weights": round(peak * GIB), "framework": 0}
        return Plan(inputs, {"policy": causes}, {}, 1, 1)


COSTS = {
    "tokens_per_pack": (16384, 4),
    "gradient_checkpointing": (False, 30),
    "freeze_vision": (False, 8),
    "reference": ("copy", 14),
    "use_peft": (False, 40),
}
ROOMS = {
    "all of it": (106, [], 0),
    "packs": (102, ["tokens_per_pack"], 0),
    "reference to the host, packs not needed": (94, ["reference"], 0),
    "those, and packs": (88, ["tokens_per_pack", "reference"], 0),
    "checkpointing alone": (76, ["gradient_checkpointing"], 0),
    "checkpointing and the reference": (63, ["reference", "gradient_checkpointing"], 0),
    "frozen": (50, ["tokens_per_pack", "reference", "gradient_checkpointing", "freeze_vision"], 0),
    "nothing": (9, ["tokens_per_pack", "reference", "gradient_checkpointing", "freeze_vision", "use_peft"], 1),
}


@pytest.mark.parametrize(("room", "expected", "missing"), ROOMS.values(), ids=ROOMS.keys())
def test_the_cheapest_that_suffice(room, expected, missing):
    advice = advise(Sums(**COSTS), INPUTS, room * GIB, EVERY)  # type: ignore[arg-type]
    assert [next(iter(each.remedy.settings)) for each in advice.applied] == expected
    assert advice.missing == missing * GIB
    assert advice.plan.peak == 106 * GIB - sum(each.saved for each in advice.applied)


def test_each_says_what_it_saves_after_those_before_it():
    advice = advise(Sums(**COSTS), INPUTS, 63 * GIB, EVERY)  # type: ignore[arg-type]
    assert [each.saved // GIB for each in advice.applied] == [14, 30]


def test_only_settings_that_there_are_are_offered():
    planner = Sums(**COSTS)
    advice = advise(planner, INPUTS, 60 * GIB, EVERY - {"reference", "use_peft"})  # type: ignore[arg-type]
    assert not any({"reference", "use_peft"} & set(each.remedy.settings) for each in advice.applied)
    known = set(GRPOConfig.__dataclass_fields__)
    for each in advise(planner, INPUTS, 9 * GIB).applied:  # type: ignore[arg-type]
        assert set(each.remedy.settings) <= known


def test_prices_rise_from_packing_to_four_bits():
    order = [next(iter(remedy.settings)) for remedy in remedies(INPUTS)]
    cheap = ["tokens_per_pack", "rollout_kv_mib", "optim", "optim", "reference", "gradient_checkpointing"]
    assert order[:6] == cheap
    assert order.index("freeze_vision") < order.index("beta") < order.index("use_peft")


def test_what_is_done_already_is_not_offered():
    done = replace(INPUTS, gradient_checkpointing=True, activation_offload=True, use_peft=True, load_in_4bit=True)
    done = replace(done, reference="none", optim="adamw_bnb_8bit", tokens_per_pack=1280, rollout_kv_mib=100.0)
    assert [dict(remedy.settings) for remedy in remedies(done)] == [{"prompts_per_device": 1}]


def test_lora_without_a_reference_has_none():
    lora = next(remedy for remedy in remedies(INPUTS) if "use_peft" in remedy.settings)
    assert lora.of(INPUTS).reference == "adapter"
    assert lora.of(replace(INPUTS, reference="none")).reference == "none"


@pytest.mark.parametrize(("room", "expected"), [(60, 2), (42, 3), (30, 5), (11, 96), (10, None)])
def test_gpus_with_zero_3(room, expected):
    """10 GiB that are not shared, and 96 that are."""
    assert gpus_needed(Sums(**COSTS), INPUTS, room * GIB) == expected  # type: ignore[arg-type]


SIZES = {"80GiB": 80 * 2**30, "24 GB": 24 * 10**9, "512mib": 512 * 2**20, "1.5TiB": 1.5 * 2**40}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["80", "0GiB", "many GiB", "-1GiB"])
def test_what_is_no_size(text):
    with pytest.raises(SettingError, match=r"gpu is .*80GiB"):
        bytes_of(text)


def test_words_of_the_report():
    planner = Sums(**COSTS)
    plan = planner.plan(INPUTS)
    plan = replace(plan, phases={"policy": dict.fromkeys(CAUSES, 0) | {"weights": plan.peak}})

    def said(room: int) -> str:
        advice = advise(planner, INPUTS, room * GIB, EVERY)  # type: ignore[arg-type]
        return report(plan, advice, "model", room * GIB, None)

    assert "It fits: the peak is 106.00 GiB, in policy; there are 110.00." in said(110)
    assert "--gradient_checkpointing true  saves 30.00 GiB; backward computes the forward again" in said(76)
    assert "Nothing fits: it misses by 1.00 GiB with all of these:" in said(9)
