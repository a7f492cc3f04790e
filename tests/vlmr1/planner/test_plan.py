"""Each setting moves the causes that it should, by the bytes that it should, and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.vlmr1.families import FAMILIES, tokenizer
from vlmr1.config import GRPOConfig
from vlmr1.errors import SettingError
from vlmr1.planner.inputs import PlanInputs, inputs_of
from vlmr1.planner.models import built, config_named
from vlmr1.planner.plan import CAUSES, Plan, Planner
from vlmr1.rollout.kv_cache import block_bytes, num_blocks
from vlmr1.tiny import CHECKPOINT

CONFIG = config_named(str(CHECKPOINT))
PLANNER = Planner()
SMALL: dict[str, Any] = {"image_tokens": 16, "text_tokens": 40, "num_generations": 3, "max_completion_length": 33}
SMALL |= {"prompts_per_device": 4, "tokens_per_pack": 512}  # two packs
PARTS = {
    "tower": lambda name: "visual" in name and "merger" not in name,
    "merger": lambda name: "merger" in name,
    "decoder": lambda name: "visual" not in name,
}


def planned(**settings: Any) -> Plan:
    return PLANNER.plan(PlanInputs(CONFIG, **{**SMALL, **settings}))


def numbers(*parts: str) -> int:
    """Of parameters."""
    return sum(p.numel() for n, p in built(CONFIG).named_parameters() if any(PARTS[part](n) for part in parts))


ALL = numbers("tower", "merger", "decoder")
BUFFERS = sum(b.numel() * b.itemsize for b in built(CONFIG).buffers())


def changed(one: Plan, other: Plan, phase: str) -> set[str]:
    return {cause for cause in CAUSES if one.phases[phase][cause] != other.phases[phase][cause]}


def test_weights_gradients_optimizer_and_reference_are_counted_to_the_byte():
    phases = planned().phases
    for phase in phases:
        assert phases[phase]["weights"] == 4 * ALL + BUFFERS
        assert phases[phase]["reference model"] == 4 * ALL + BUFFERS
        assert phases[phase]["optimizer"] == 8 * ALL
    assert phases["policy"]["gradients"] == phases["update"]["gradients"] == 4 * ALL
    assert phases["rollout"]["gradients"] == phases["reference"]["gradients"] == 0


def kv_bytes(groups: int, dtype: torch.dtype) -> int:
    group = num_blocks(16 + 40) + 3 * num_blocks(32)
    return block_bytes(CONFIG.get_text_config(), dtype) * (groups * group + 1)  # and the scratch block


KV = {
    "float32": ({}, kv_bytes(4, torch.float32)),
    "bf16": ({"bf16": True}, kv_bytes(4, torch.bfloat16)),
    "two generations of prompts": ({"steps_per_generation": 2}, kv_bytes(8, torch.float32)),
    "a budget below a group": ({"rollout_kv_mib": 1e-6}, kv_bytes(1, torch.float32)),
}


@pytest.mark.parametrize(("settings", "expected"), KV.values(), ids=KV.keys())
def test_kv_cache_is_the_pool_of_blocks(settings, expected):
    plan = planned(**settings)
    assert plan.phases["rollout"]["kv cache"] == expected
    assert all(plan.phases[phase]["kv cache"] == 0 for phase in plan.phases if phase != "rollout")


def test_a_kv_budget_is_kept():
    each = block_bytes(CONFIG.get_text_config(), torch.float32)
    found = planned(rollout_kv_mib=25 * each / 2**20).phases["rollout"]["kv cache"]
    assert found == 26 * each


# Setting -> the causes that differ in the update phase, where nothing depends on where a peak is.
UPDATE = {
    "optim": ({"optim": "adamw_bnb_8bit"}, {"optimizer"}),
    "freeze_vision": ({"freeze_vision": True}, {"gradients", "optimizer", "reference model"}),
    "bfloat16 weights": ({"model_dtype": "bfloat16"}, {"weights", "optimizer", "reference model"}),
    "bf16 compute": ({"bf16": True}, set()),
    "no reference": ({"reference": "none"}, {"reference model"}),
    "reference in host memory": ({"reference": "offload"}, {"reference model"}),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, set()),
    "tokens_per_pack": ({"tokens_per_pack": 256}, set()),
    "completions": ({"max_completion_length": 65}, set()),
    "rollout_kv_mib": ({"rollout_kv_mib": 0.1}, set()),
    "cpu": ({"device": "cpu"}, {"framework", "images"}),
}


@pytest.mark.parametrize(("settings", "expected"), UPDATE.values(), ids=UPDATE.keys())
def test_what_a_setting_changes_outside_of_the_passes(settings, expected):
    assert changed(planned(), planned(**settings), "update") == expected


# Setting -> the causes that differ in the rollout and in the policy pass, and by how much activations must fall there.
PASSES = {
    "optim": ({"optim": "sgd"}, {"optimizer"}, {"optimizer"}),
    "no reference": ({"reference": "none"}, {"reference model"}, {"reference model"}),
    "rollout_kv_mib": ({"rollout_kv_mib": 0.1}, {"kv cache", "activations", "vision tower", "logits"}, set()),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, set(), {"activations", "vision tower", "logits"}),
    "tokens_per_pack": ({"tokens_per_pack": 256}, set(), {"activations", "vision tower", "logits"}),
}


@pytest.mark.parametrize(("settings", "rollout", "policy"), PASSES.values(), ids=PASSES.keys())
def test_what_a_setting_changes_in_the_passes(settings, rollout, policy):
    before, after = planned(), planned(**settings)
    assert changed(before, after, "rollout") <= rollout
    assert changed(before, after, "policy") <= policy
    assert changed(before, after, "rollout") | changed(before, after, "policy")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_checkpointing_and_smaller_packs_take_less(device):
    long = {"device": device, "max_completion_length": 129}
    policy = {
        name: planned(**long, **more).phases["policy"]["activations"]
        for name, more in {
            "all": {"tokens_per_pack": 4096},
            "a group": {"tokens_per_pack": 512},
            "kept": {"tokens_per_pack": 4096, "gradient_checkpointing": True},
        }.items()
    }
    assert policy["a group"] < 0.4 * policy["all"]  # 440 tokens of 1,760
    assert policy["kept"] < 0.6 * policy["all"]


def test_frozen_vision_keeps_features_and_nothing_else():
    frozen, trained = planned(freeze_vision=True), planned()
    features = 4 * 4 * 16 * CONFIG.get_text_config().hidden_size
    assert features <= frozen.phases["policy"]["vision tower"] < 4 * features
    assert frozen.phases["policy"]["vision tower"] < trained.phases["policy"]["vision tower"] / 4
    assert frozen.trained == numbers("decoder")
    assert frozen.phases["update"]["optimizer"] == 8 * numbers("decoder")


STATES = {
    "adamw_torch_fused": 8 * ALL,
    "sgd": 0,
    "lion_32bit": 4 * ALL,
}


@pytest.mark.parametrize(("optim", "expected"), STATES.items(), ids=STATES.keys())
def test_bytes_of_optimizer_states(optim, expected):
    assert planned(optim=optim).phases["policy"]["optimizer"] == expected


def test_adamw_over_lists_needs_one_copy_more_while_it_steps():
    plan = planned(optim="adamw_torch")
    assert plan.phases["policy"]["optimizer"] == 8 * ALL
    assert plan.phases["update"]["optimizer"] == 12 * ALL


def test_8_bit_states_leave_embeddings_and_small_tensors_wide():
    shapes = {name: p.numel() for name, p in built(CONFIG).named_parameters()}
    wide = {n for n, count in shapes.items() if count < 4096 or "embed_tokens" in n}
    expected = sum(count * (8 if name in wide else 2 * (1 + 4 / 256)) for name, count in shapes.items())
    assert planned(optim="adamw_bnb_8bit").phases["policy"]["optimizer"] == round(expected)


def test_paged_states_are_on_the_device_only_while_it_steps():
    plan, flat = planned(optim="paged_adamw_8bit"), planned(optim="adamw_bnb_8bit")
    states = flat.phases["update"]["optimizer"]
    assert (plan.phases["policy"]["optimizer"], plan.phases["update"]["optimizer"]) == (0, states)
    assert plan.host["optimizer"] == states


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(SettingError, match=r"optim=lomo: .* does not know.*adamw_torch"):
        planned(optim="lomo")


def test_a_reference_in_host_memory_is_on_the_device_for_its_pass():
    plan = planned(reference="offload")
    assert {phase: plan.phases[phase]["reference model"] for phase in plan.phases} == {
        "rollout": 0,
        "reference": 4 * ALL + BUFFERS,
        "policy": 0,
        "update": 0,
    }
    assert plan.host["reference model"] == 4 * ALL + BUFFERS


def test_images_of_two_generations_are_in_host_memory():
    """16 tokens are 64 patches of 14 x 14 px, two frames, three channels; and a grid of three int64."""
    each = 64 * 3 * 2 * 14 * 14 * 4 + 3 * 8
    assert planned().host["images"] == 2 * 4 * each
    assert planned().phases["update"]["images"] == 0
    assert planned(device="cpu").phases["update"]["images"] == 2 * 4 * each
    assert planned(image_tokens=0).host["images"] == 0


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_planned(family, device):
    """In the rollout keys and values to the byte, in the policy pass a gradient for every trained parameter, and
    activations that grow with the completions."""
    config = FAMILIES[family].config(tokenizer(FAMILIES[family]).get_vocab())
    settings = SMALL | {"device": device, "tokens_per_pack": 4096}
    one, longer = (Planner().plan(PlanInputs(config, **{**settings, "max_completion_length": c})) for c in (33, 65))
    assert one.phases["update"]["gradients"] == 4 * one.parameters == 4 * one.trained
    assert one.phases["rollout"]["kv cache"] > 0 and one.phases["policy"]["vision tower"] > 0
    more = longer.phases["policy"]["activations"] - one.phases["policy"]["activations"]
    text = config.get_text_config(decoder=True)
    assert more > 4 * (4 * 3 * 32) * text.hidden_size * text.num_hidden_layers


ENGINES = {
    "transformers engine": {"rollout_engine": "transformers"},
    "repeated prompts": {"share_prompt": False, "share_vision": False},
    "naive": {"share_prompt": False, "share_vision": False, "pack": False},
}


@pytest.mark.parametrize("settings", ENGINES.values(), ids=ENGINES.keys())
def test_what_is_not_shared_takes_more(settings):
    phase = "rollout" if "rollout_engine" in settings else "policy"
    one = {"prompts_per_device": 1}  # a naive row has one group
    assert planned(**one, **settings).total(phase) > planned(**one).total(phase)


def test_without_a_reference_there_is_no_pass_of_it():
    assert "reference" not in planned(reference="none").phases


def test_checkpoints_in_host_memory():
    """Of each layer its input, [tokens, D] float32, and the three that the norm behind them keeps."""
    plan = planned(gradient_checkpointing=True, activation_offload=True)
    text = CONFIG.get_text_config()
    tokens = 3 * (56 + 3 * 32)  # a pack of three of the four groups
    each = 4 * tokens * text.hidden_size
    assert plan.host["activations"] == each * (text.num_hidden_layers + 3)
    kept = planned(gradient_checkpointing=True)
    assert plan.phases["policy"]["activations"] < kept.phases["policy"]["activations"]


ZERO = {
    0: {},
    1: {"optimizer"},
    2: {"optimizer", "gradients"},
    3: {"optimizer", "gradients", "weights", "reference model"},
}


@pytest.mark.parametrize(("stage", "shared"), ZERO.items())
def test_zero_divides_by_the_number_of_gpus(stage, shared):
    one, four = planned(), planned(gpus=4, zero=stage)
    assert changed(one, four, "update") == set(shared)
    for cause in set(shared) - {"weights"}:
        assert four.phases["update"][cause] == -(-one.phases["update"][cause] // 4)


# From settings to inputs


def config_of(tmp_path: Any, **settings: Any) -> GRPOConfig:
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)


def test_inputs_come_from_the_settings(tmp_path):
    config = config_of(tmp_path, bf16=True, num_generations=4, optim="adamw_torch", beta=0.0, freeze_vision=True)
    inputs = inputs_of(config, CONFIG, gpus=2, image_tokens=64, text_tokens=7)
    assert (inputs.bf16, inputs.num_generations, inputs.optim, inputs.freeze_vision) == (True, 4, "adamw_torch", True)
    assert (inputs.gpus, inputs.prompt_tokens, inputs.reference) == (2, 71, "none")


def test_settings_of_other_versions_have_their_part(tmp_path):
    config: Any = config_of(tmp_path)
    config.use_peft, config.lora_r, config.lora_target_modules, config.reference = True, 4, ["q_proj"], "auto"
    inputs = inputs_of(config, CONFIG)
    assert (inputs.use_peft, inputs.lora_r, inputs.lora_target_modules) == (True, 4, ("q_proj",))
    assert inputs.reference == "adapter"
    plan = PLANNER.plan(replace(inputs, **SMALL))
    text = CONFIG.get_text_config()
    assert plan.trained == 4 * text.num_hidden_layers * 2 * text.hidden_size
    assert plan.phases["update"]["gradients"] == 4 * plan.trained


REFUSED = {
    "4-bit without adapters": ({"load_in_4bit": True}, "load_in_4bit needs use_peft"),
    "offload without checkpointing": ({"activation_offload": True}, "activation_offload needs gradient_checkpointing"),
    "adapter without adapters": ({"reference": "adapter"}, "reference=adapter needs use_peft"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_that_exclude_one_another(settings, message, tmp_path):
    config = config_of(tmp_path)
    for name, value in settings.items():
        setattr(config, name, value)
    with pytest.raises(SettingError, match=message):
        inputs_of(config, CONFIG)
