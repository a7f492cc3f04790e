"""Each setting moves the causes that it should, by the bytes that it should, and no other."""

from collections.abc import Collection
from itertools import product
from typing import Any

import pytest
import torch

from tests.helpers.families import FAMILIES, config_of
from tests.helpers.jobs import CONFIG, args_of, job
from tests.helpers.slow import mostly_slow
from vlmr1.grpo.reference import frozen_copy
from vlmr1.models import family_for, load_model
from vlmr1.models.frozen import frozen_in
from vlmr1.models.lora import base_of
from vlmr1.models.settings import ParameterSettings
from vlmr1.models.trainable import choose_trained, planned_model
from vlmr1.planner import peak_bytes
from vlmr1.planner.plan import CAUSES, Plan, Planner
from vlmr1.rollout.kv_cache import block_bytes, num_blocks, rounded_up
from vlmr1.tiny import CHECKPOINT

PLANNER = Planner()
MODEL = planned_model(CONFIG, args_of())
PARTS = {
    "tower": lambda name: "visual" in name and "merger" not in name,
    "merger": lambda name: "merger" in name,
    "decoder": lambda name: "visual" not in name,
}


def planned(**given: Any) -> Plan:
    return PLANNER.plan(job(**given))


def numbers(*parts: str) -> int:
    """Bytes of parameters."""
    return sum(p.numel() for n, p in MODEL.named_parameters() if any(PARTS[part](n) for part in parts))


ALL = numbers("tower", "merger", "decoder")
BUFFERS = sum(b.numel() * b.itemsize for b in MODEL.buffers())


def changed(one: Plan, other: Plan, phase: str) -> set[str]:
    return {cause for cause in CAUSES if one.phases[phase][cause] != other.phases[phase][cause]}


def test_weights_gradients_optimizer_and_reference_are_counted_to_the_byte():
    phases = planned().phases
    for causes in phases.values():
        assert causes["weights"] == causes["reference model"] == 4 * ALL + BUFFERS
        assert causes["optimizer"] == 8 * ALL
    assert phases["policy"]["gradients"] == phases["update"]["gradients"] == 4 * ALL
    assert phases["rollout"]["gradients"] == phases["reference"]["gradients"] == 0
    assert "reference" not in planned(beta=0.0).phases


def kv_bytes(groups: int, dtype: torch.dtype, *, kept: bool = True) -> int:
    blocks = groups * (num_blocks(16 + 40) + 3 * num_blocks(32))
    blocks = rounded_up(blocks) if kept else blocks
    return block_bytes(CONFIG.get_text_config(), dtype) * (blocks + 1)  # and the scratch block


# Setting -> the causes that differ in the update phase, where nothing depends on where a peak is.
HELD = {"kv cache", "cuda graphs", "decode weights"}  # until the next rollout
ROUNDED = {"model_dtype": "bfloat16", "stochastic_rounding": True, "optim": "adamw_torch_8bit"}
UPDATE = {
    "optim": ({"optim": "adamw_bnb_8bit"}, {"optimizer"}),
    "freeze_vision": ({"freeze_vision": True}, {"gradients", "optimizer", "reference model"}),
    "bfloat16 weights": (ROUNDED, {"weights", "optimizer", "reference model", *HELD}),
    "bf16 compute": ({"bf16": True}, {"reference model", *HELD}),  # copies that a graph reads
    "autocast's copies": ({"bf16": True, "fused_layers": "torch"}, {"reference model", *HELD}),  # are not kept
    "no reference": ({"beta": 0.0}, {"reference model"}),
    "reference in host memory": ({"reference": "offload"}, {"reference model"}),
    "activation_checkpointing": ({"activation_checkpointing": True}, set()),
    "tokens_per_pack": ({"tokens_per_pack": 256}, set()),
    "completions": ({"max_completion_length": 65}, {"kv cache"}),
    "rollout_kv_mib": ({"rollout_kv_mib": 0.1}, {"kv cache", "cuda graphs"}),
    "freed cache": ({"rollout_keep_cache": False}, HELD),
    "no graphs": ({"cuda_graphs": False}, HELD),
    "cpu": ({"device": "cpu"}, {"framework", "images", *HELD}),
}


QUICK = ("optim", "freeze_vision", "bfloat16 weights", "no reference", "reference in host memory", "freed cache")


@pytest.mark.parametrize(("settings", "expected"), mostly_slow(UPDATE, *QUICK))
def test_what_a_setting_changes_outside_of_the_passes(settings, expected):
    assert changed(planned(), planned(**settings), "update") == expected


# Setting -> the causes that differ in the rollout and in the policy pass, and by how much activations must fall there.
COMPUTED = {"activations", "vision tower", "logits"}
PASSES = {
    "optim": ({"optim": "sgd"}, {"optimizer"}, {"optimizer"}),
    "no reference": ({"beta": 0.0}, {"reference model"}, {"reference model"}),
    "rollout_kv_mib": ({"rollout_kv_mib": 0.1}, HELD | COMPUTED, HELD),
    "activation_checkpointing": ({"activation_checkpointing": True}, set(), COMPUTED),
    "tokens_per_pack": ({"tokens_per_pack": 256}, set(), COMPUTED),
}


@pytest.mark.parametrize(("settings", "rollout", "policy"), mostly_slow(PASSES, "optim", "no reference"))
def test_what_a_setting_changes_in_the_passes(settings, rollout, policy):
    before, after = planned(), planned(**settings)
    assert changed(before, after, "rollout") <= rollout
    assert changed(before, after, "policy") <= policy
    assert changed(before, after, "rollout") | changed(before, after, "policy")


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_checkpointing_and_smaller_packs_take_less(device):
    long = {"device": device, "max_completion_length": 129}

    def activations(tokens_per_pack: int, **more: Any) -> int:
        return planned(**long, tokens_per_pack=tokens_per_pack, **more).phases["policy"]["activations"]

    assert activations(512) < 0.4 * activations(4096)  # 440 tokens of 1,760
    assert activations(4096, activation_checkpointing=True) < 0.6 * activations(4096)


def test_frozen_vision_keeps_features_and_nothing_else():
    frozen, trained = planned(freeze_vision=True), planned()
    features = 4 * 4 * 16 * CONFIG.get_text_config().hidden_size
    assert features <= frozen.phases["policy"]["vision tower"] < 4 * features
    assert frozen.phases["policy"]["vision tower"] < trained.phases["policy"]["vision tower"] / 4
    assert frozen.trained == numbers("decoder")
    assert frozen.phases["update"]["optimizer"] == 8 * numbers("decoder")


def in_8_bits(name: str, count: int) -> int:
    """Bytes of a parameter's moment: embeddings and small tensors stay float32, blocks of 256 share a scale."""
    return 4 * count if count < 4096 or "embed_tokens" in name else count + 4 * -(-count // 256)


BLOCK = block_bytes(CONFIG.get_text_config(), torch.float32)
GROUP = BLOCK * (num_blocks(16 + 40) + 3 * num_blocks(32))
# 16 tokens are 64 patches of 14 x 14 px, two frames, three channels; and a grid of three int64. Of two generations.
IMAGES = 2 * 4 * (64 * 3 * 2 * 14 * 14 * 4 + 3 * 8)
# Pages hold the states of parameters from 100,000 numbers on; scales are no part of them.
PAGES = sum(8 * p.numel() for p in MODEL.parameters() if p.numel() >= 1e5)
PAGED = {"host optimizer": PAGES, "policy optimizer": 8 * ALL - PAGES, "update optimizer": 8 * ALL}
REFERENCE = {f"{place} reference model": 4 * ALL + BUFFERS for place in ("host", "reference")}
REFERENCE |= {f"{phase} reference model": 0 for phase in ("rollout", "policy", "update")}
IN_8_BITS = sum(2 * in_8_bits(name, p.numel()) for name, p in MODEL.named_parameters())
BYTES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {  # settings -> bytes by phase, or of the host, and cause
    "defaults": ({}, {"rollout kv cache": kv_bytes(4, torch.float32), "host images": IMAGES, "update images": 0}),
    "bf16": ({"bf16": True}, {"rollout kv cache": kv_bytes(4, torch.bfloat16)}),
    "freed cache": ({"rollout_keep_cache": False}, {"rollout kv cache": kv_bytes(4, torch.float32, kept=False)}),
    "two generations of prompts": ({"steps_per_generation": 2}, {"rollout kv cache": kv_bytes(8, torch.float32)}),
    "a budget below a group": ({"rollout_kv_mib": 1e-6}, {"rollout kv cache": kv_bytes(1, torch.float32)}),
    "a budget": ({"rollout_kv_mib": 25 * BLOCK / 2**20}, {"rollout kv cache": 26 * BLOCK, "host kv cache": 3 * GROUP}),
    "adamw_torch_fused": ({"optim": "adamw_torch_fused"}, {"policy optimizer": 8 * ALL, "update optimizer": 8 * ALL}),
    "adamw over lists": ({"optim": "adamw_torch"}, {"policy optimizer": 8 * ALL, "update optimizer": 12 * ALL}),
    "sgd": ({"optim": "sgd"}, {"policy optimizer": 0}),
    "lion_32bit": ({"optim": "lion_32bit"}, {"policy optimizer": 4 * ALL}),
    "adamw_bnb_8bit": ({"optim": "adamw_bnb_8bit"}, {"policy optimizer": IN_8_BITS}),
    "paged": ({"optim": "paged_adamw_32bit"}, PAGED),
    "paged, cpu": (
        {"optim": "paged_adamw_32bit", "device": "cpu"},
        {"host optimizer": 0, "policy optimizer": 8 * ALL, "update images": IMAGES},
    ),
    "reference in host memory": ({"reference": "offload"}, REFERENCE),
    "no images": ({"image_tokens": 0}, {"host images": 0}),
}


QUICK = ("defaults", "adamw over lists", "sgd", "adamw_bnb_8bit", "paged", "reference in host memory")


@pytest.mark.parametrize(("settings", "expected"), mostly_slow(BYTES, *QUICK))
def test_bytes(settings, expected):
    plan = planned(**settings)
    found = {f"{phase} {cause}": n for phase, causes in plan.phases.items() for cause, n in causes.items()}
    found |= {f"host {cause}": n for cause, n in plan.host.items()}
    assert {name: found[name] for name in expected} == expected
    kept = plan.job.device == "cuda" and not settings.keys() & {"rollout_keep_cache"}
    for phase, cause in product(plan.phases, HELD):
        assert phase == "rollout" or found[f"{phase} {cause}"] == kept * found[f"rollout {cause}"]
    assert 0 < PAGES < 8 * ALL


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("family", mostly_slow([*FAMILIES], "qwen2_5_vl", "internvl"))
@pytest.mark.slow
def test_every_family_is_planned(family, device):
    """In the rollout keys and values to the byte, in the policy pass a gradient for every trained parameter, and
    activations that grow with the completions."""
    config = config_of(family)
    settings: dict[str, Any] = {"device": device, "tokens_per_pack": 4096}
    one, longer = (Planner().plan(job(config, max_completion_length=length, **settings)) for length in (33, 65))
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


@pytest.mark.parametrize("settings", mostly_slow(ENGINES, "naive"))
def test_what_is_not_shared_takes_more(settings):
    phase = "rollout" if "rollout_engine" in settings else "policy"
    one = {"prompts_per_device": 1}  # a naive row has one group
    assert planned(**one, **settings).total(phase) > planned(**one).total(phase)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "kept_by_norm"), [("torch", 3), ("auto", 1)])
def test_checkpoints_in_host_memory(layers, kept_by_norm):
    """For each layer its input, [tokens, D] float32, and those that the norm behind them keeps."""
    plan = planned(activation_checkpointing=True, activation_offload=True, fused_layers=layers)
    text = CONFIG.get_text_config()
    tokens = 3 * (56 + 3 * 32)  # a pack of three of the four groups
    each = 4 * tokens * text.hidden_size
    assert plan.host["activations"] == each * (text.num_hidden_layers + kept_by_norm)
    kept = planned(activation_checkpointing=True, fused_layers=layers)
    assert plan.phases["policy"]["activations"] < kept.phases["policy"]["activations"]


ZERO = [set(), {"optimizer"}, {"optimizer", "gradients"}]
ZERO += [ZERO[2] | {"weights", "reference model", *HELD}]  # gathered weights have other addresses each time


@pytest.mark.parametrize("stage", range(4))
def test_zero_divides_by_the_number_of_gpus(stage):
    one, four = planned(), planned(gpus=4, zero=stage)
    assert changed(one, four, "update") == ZERO[stage]
    for cause in ZERO[stage] - {"weights", *HELD}:
        assert four.phases["update"][cause] == -(-one.phases["update"][cause] // 4)


# Adapters


def test_lora_trains_its_matrices_alone():
    plan = planned(use_peft=True, lora_r=4, lora_target_modules=["q_proj"])
    text = CONFIG.get_text_config()
    assert plan.trained == 4 * text.num_hidden_layers * 2 * text.hidden_size
    assert plan.phases["update"]["gradients"] == 4 * plan.trained
    assert plan.phases["reference"]["reference model"] == 0  # the adapter switched off
    assert planned(use_peft=True, reference="copy").phases["policy"]["reference model"] > 0


DECODER_LINEAR = sum(p.numel() for n, p in MODEL.named_parameters() if "language_model.layers" in n and p.dim() == 2)
WIDTHS = sum(p.shape[0] for n, p in MODEL.named_parameters() if "language_model.layers" in n and p.dim() == 2)


@pytest.mark.slow
def test_dora_trains_a_magnitude_a_row_and_computes_norms():
    plain, dora = planned(use_peft=True), planned(use_peft=True, use_dora=True)
    assert dora.trained - plain.trained == WIDTHS
    for phase in ("rollout", "reference", "policy"):
        assert dora.phases[phase]["activations"] > plain.phases[phase]["activations"]


@pytest.mark.slow
def test_modules_to_save_are_trained_beside_their_frozen_originals():
    plain, saved = planned(use_peft=True), planned(use_peft=True, lora_modules_to_save=["merger"])
    assert saved.trained - plain.trained == numbers("merger")
    assert saved.phases["update"]["weights"] - plain.phases["update"]["weights"] == 4 * numbers("merger")


@pytest.mark.slow
def test_a_merged_adapter_costs_a_copy_of_its_layers_in_the_rollout():
    plain, merged = planned(use_peft=True), planned(use_peft=True, lora_merge_rollout=True)
    assert merged.phases["rollout"]["weights"] - plain.phases["rollout"]["weights"] == 4 * DECODER_LINEAR
    assert changed(plain, merged, "policy") == changed(plain, merged, "update") == HELD  # merged weights move


@pytest.mark.slow
def test_parameters_in_4_bits_are_counted_as_numbers():
    qlora: dict[str, Any] = {"use_peft": True, "load_in_4bit": True, "model_dtype": "bfloat16", "bf16": True}
    four, plain = planned(**qlora), planned(use_peft=True)
    assert (four.parameters, four.trained) == (plain.parameters, plain.trained)
    assert planned(**qlora, use_dora=True).trained - four.trained == WIDTHS


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"freeze_vision": True}, {"use_peft": True}], ids=["full", "tower", "lora"])
def test_frozen_weights_and_the_reference_in_bfloat16_are_counted_to_the_byte(given):
    """As a trainer has them; a reference that moves, or is sharded, is float32."""
    given = given | {"bf16": True, "reference": "copy"}
    plan = planned(**given)
    model = choose_trained(load_model(CHECKPOINT), family_for(CONFIG), ParameterSettings.of(args_of(**given)))
    base = base_of(model)
    own = {id(parameter) for parameter in base.parameters() if not parameter.requires_grad}
    assert plan.phases["reference"]["reference model"] == bytes_of(frozen_copy(base, dtype=torch.bfloat16), own)
    with frozen_in(base, torch.bfloat16):
        head = base.lm_head.weight  # its copy is counted with the logits of a pass
        assert plan.phases["reference"]["weights"] == bytes_of(base) - (0 if head.requires_grad else head.nbytes)
    float32 = 4 * plan.trained + BUFFERS
    for more, expected in (({"sync_ref_model": True}, float32), ({"zero": 3, "gpus": 2}, -(-float32 // 2))):
        assert planned(**given, **more).phases["reference"]["reference model"] == expected


def bytes_of(model: Any, without: Collection[int] = ()) -> int:
    own = [parameter for parameter in model.parameters() if id(parameter) not in without]
    return sum(each.nbytes for each in (*own, *model.buffers()))


# On a CPU the implementations that run are counted


@pytest.mark.slow
def test_reference_attention_on_a_cpu_has_the_scores_of_the_whole_pack():
    """Scores, and their softmax, [heads, L, L] float32, are alive in each layer's backward."""
    given: dict[str, Any] = {"device": "cpu", "max_completion_length": 129, "tokens_per_pack": 4096}
    auto = planned(**given)
    dense = planned(**given, kernels="shared_prefix_attention=reference")
    text = CONFIG.get_text_config()
    scores = 4 * text.num_attention_heads * (4 * (56 + 3 * 128)) ** 2
    assert dense.peak - auto.peak > 1.5 * scores
    fields = {"device": "cpu", "image_tokens": 16, "text_tokens": 40}
    assert peak_bytes(auto.job.args, CONFIG, **fields) == auto.peak
