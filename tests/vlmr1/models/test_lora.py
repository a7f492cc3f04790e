"""LoRA in every model family, also over weights in 4 bits: the shared step is the naive step, rollouts draw from the
adapted model, and the reference is the model without its adapter."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn

import vlmr1_kernels
from tests.helpers import families
from tests.helpers.families import checkpoints, one_family
from tests.helpers.lora_steps import LORA, assert_rollouts_are_adapted, trainer_of
from tests.helpers.maker import Maker
from tests.helpers.slow import mostly_slow
from tests.helpers.steps import NAIVE, assert_equal_steps
from tests.helpers.updates import update
from vlmr1.config import GRPOConfig
from vlmr1.errors import SettingError
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.models import family_of, load_model
from vlmr1.models.lora import merged, with_lora
from vlmr1.models.settings import ParameterSettings
from vlmr1.types import Group

KINDS = {"lora": LORA, "qlora": LORA | {"load_in_4bit": True}}
checkpoint = checkpoints()


def model_of(checkpoint: Path, kind: str) -> Any:
    return load_model(checkpoint, compute_dtype=torch.float32 if kind == "qlora" else None)


def weights_of(trainer: GRPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def changed(trainer: GRPOTrainer, before: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]


def groups_of(make: Maker) -> list[Group]:
    """Made once: later calls draw other numbers."""
    return make.groups(
        ("Locate the digit 1.", ("wide",), (6, 3)),
        ("What is seven?", (), (4, 9)),
        ("Locate the digit 2.", (84, "wide"), (5, 1, 7)),
    )


# The step


@pytest.mark.parametrize("kind", mostly_slow([*KINDS], "qlora"))
def test_shared_step_equals_naive(kind, checkpoint, make, processor, tmp_path):
    """Every adapter weight has a gradient, nothing else has one, and it is the naive trainer's."""
    groups, model = groups_of(make), model_of(checkpoint, kind)
    naive = update(trainer_of(model, processor, tmp_path, **KINDS[kind], **NAIVE), groups)
    trainer = trainer_of(model, processor, tmp_path, **KINDS[kind])
    layers, decoder = model.config.text_config.num_hidden_layers, family_of(model).decoder_path
    assert len(naive[2]) == 2 * layers * (6 if model.config.model_type == "glm4v" else 7)
    assert all("lora_" in name and decoder in name and gradient.norm() > 0 for name, gradient in naive[2].items())
    assert naive[0] != 0 and naive[1]["kl"] > 1e-3
    assert trainer.features is not None  # the tower is frozen
    assert_equal_steps(update(trainer, groups), naive)


VARIANTS: dict[str, tuple[dict[str, Any], Any]] = {  # settings, and what is trained beside the matrices
    "vision": ({"lora_vision": True}, lambda name: name.startswith("model.visual.") and "lora_" in name),
    "merger": ({"lora_modules_to_save": ["visual.merger"]}, lambda name: ".visual.merger.modules_to_save." in name),
    "dora": ({"use_dora": True}, lambda name: "lora_magnitude_vector" in name),
    "rslora": ({"use_rslora": True}, None),
    "some modules": ({"lora_target_modules": ["q_proj", "down_proj"]}, None),
    "copy": ({"reference": "copy"}, None),
    "freeze_vision, which an adapter does anyway": ({"freeze_vision": True}, None),
    "split groups": ({"tokens_per_pack": 64}, None),
}


@one_family()
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_shared_step(variant, make, model, processor, tmp_path):
    groups, (settings, added) = groups_of(make), VARIANTS[variant]
    naive = update(trainer_of(model, processor, tmp_path, **LORA, **settings | NAIVE), groups)
    plain = update(trainer_of(model, processor, tmp_path, **LORA), groups)
    trainer = trainer_of(model, processor, tmp_path, **LORA, **settings)
    found = update(trainer, groups)
    assert_equal_steps(found, naive)
    names, usual = ({name.removeprefix("base_model.model.") for name in each[2]} for each in (found, plain))
    assert bool(names - usual) == bool(added) and all(map(added, names - usual))
    assert (trainer.features is None) == (variant in ("vision", "merger"))
    if variant == "dora":
        assert len(names - usual) == 2 * 7
    if variant == "some modules":
        assert {name.split(".lora_")[0].split(".")[-1] for name in names} == {"q_proj", "down_proj"}
    if variant == "rslora":  # 8 / sqrt(4) instead of 8 / 4
        layer = trainer.policy.model.model.language_model.layers[0].self_attn.q_proj
        assert layer.scaling == {"default": 4.0}


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_activation_checkpointing(reentrant, make, model, processor, tmp_path):
    """Nothing before the first adapter needs a gradient, and the layers are recomputed all the same."""
    groups = groups_of(make)
    kept = update(trainer_of(model, processor, tmp_path, **LORA), groups)
    trainer = trainer_of(model, processor, tmp_path, **LORA)
    # As `Trainer.train` does with gradient_checkpointing.
    trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    calls: list[int] = []
    decoder = trainer.policy.model.get_decoder()
    decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_equal_steps(update(trainer, groups), kept)
    packs = len(trainer.runner.packs(groups))
    assert len(calls) == 3 * packs  # reference, policy, policy again


@one_family()
def test_the_head_is_frozen_and_the_loss_knows(make, model, processor, tmp_path, monkeypatch):
    trainer = trainer_of(model, processor, tmp_path, **LORA)
    assert not trainer.family.head(trainer.policy.model).weight.requires_grad
    needs, loss_of = [], vlmr1_kernels.linear_grpo_loss

    def spied(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        needs.append((hidden.requires_grad, weight.requires_grad))
        return loss_of(hidden, weight, *args, **kwargs)

    monkeypatch.setattr("vlmr1.grpo.loss.linear_grpo_loss", spied)
    update(trainer, groups_of(make))
    full = GRPOTrainer(model, GRPOConfig(output_dir=str(tmp_path), use_cpu=True), [], processor, ["format"])
    update(full, groups_of(make))
    assert needs == [(True, False), (True, True)]


# Rollouts


@pytest.mark.parametrize("kind", mostly_slow([*KINDS], "qlora"))
def test_rollouts_draw_from_the_adapted_model(kind, checkpoint, make, processor, tmp_path):
    """And the weights are afterwards what they were."""
    model = model_of(checkpoint, kind)
    trainer = trainer_of(model, processor, tmp_path, **KINDS[kind])  # of a copy
    before = weights_of(trainer)
    assert_rollouts_are_adapted(make, model, processor, trainer, ("wide",))
    assert changed(trainer, before) == []


MERGED = [("qwen3_vl", "lora"), ("qwen2_5_vl", "dora"), ("idefics3", "lora")]


@pytest.mark.parametrize("checkpoint, variant", MERGED, indirect=["checkpoint"])
def test_a_merged_rollout_and_weights_restored(variant, make, model, processor, tmp_path):
    """Merged, the adapter layers compute with one product, and after it every weight is what it was."""
    settings = LORA | {"use_dora": variant == "dora", "lora_merge_rollout": True}
    trainer = trainer_of(model, processor, tmp_path, **settings)
    policy, pack, before = trainer.policy, make_pack(groups_of(make)), weights_of(trainer)
    apart = policy.logprobs(pack)
    products: list[int] = []
    for name, module in trainer.model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_: products.append(1))
    with merged(trainer.model):
        torch.testing.assert_close(policy.logprobs(pack), apart, rtol=1e-4, atol=1e-4)
        assert products == []
        adapted = changed(trainer, before)
        assert adapted and all("base_layer.weight" in name for name in adapted)
    assert changed(trainer, before) == []
    assert torch.equal(policy.logprobs(pack), apart) and products
    products.clear()
    trainer.rollout([make.prompt("What is seven?")])
    assert products == []  # the setting reaches the rollout
    assert changed(trainer, before) == []


@one_family()
def test_weights_are_restored_where_a_merged_rollout_fails(make, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, **LORA)
    before = weights_of(trainer)
    with pytest.raises(RuntimeError, match="no tokens"), merged(trainer.model):
        raise RuntimeError("no tokens")
    assert changed(trainer, before) == []
    assert trainer.policy.model.model.language_model.layers[0].mlp.up_proj.merged_adapters == []


# Adapters


@one_family()
def test_adapters_are_float32_beside_bfloat16_weights(checkpoint, processor, make, tmp_path):
    model = load_model(checkpoint, dtype=torch.bfloat16)
    trainer = trainer_of(model, processor, tmp_path, **LORA, model_dtype="bfloat16")
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    _, _, gradients = update(trainer, groups_of(make))
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@one_family()
def test_first_weights_follow_from_the_seed(model, tmp_path):
    def first(seed: int) -> torch.Tensor:
        config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, seed=seed, **LORA)
        torch.manual_seed(torch.seed() % 1000)  # has no part
        lora = with_lora(copy.deepcopy(model), family_of(model), ParameterSettings.of(config))
        return next(p.detach() for n, p in lora.named_parameters() if "lora_A" in n)

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


NOT_MODULES = {
    "unknown": ({"lora_target_modules": ["qq_proj"]}, "'qq_proj' is no linear layer of the decoder"),
    "of the tower": ({"lora_target_modules": ["qkv"]}, "lora_vision adds the vision tower"),
    "head": ({"lora_target_modules": ["lm_head"]}, "'lm_head' is the head, whose weights the loss reads"),
    "head, whole": ({"lora_modules_to_save": ["lm_head"]}, "holds the head or embeddings"),
    "embeddings": ({"lora_modules_to_save": ["embed_tokens"]}, "holds the head or embeddings"),
    "decoder": ({"lora_modules_to_save": ["language_model"]}, "holds the head or embeddings"),
    "no module": ({"lora_modules_to_save": ["nothing"]}, "lora_modules_to_save: the model has no module 'nothing'"),
}


@one_family()
@pytest.mark.parametrize("settings, message", NOT_MODULES.values(), ids=NOT_MODULES.keys())
def test_modules_that_cannot_have_an_adapter(settings, message, model, processor, tmp_path):
    with pytest.raises(SettingError, match=message):
        trainer_of(model, processor, tmp_path, **LORA, **settings)


@one_family()
def test_vision_modules_by_name(model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, **LORA, lora_vision=True, lora_target_modules=["qkv"])
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names and all(".visual.blocks." in name and ".qkv." in name for name in names)


@one_family()
def test_text_alone_moves_no_adapter_of_the_tower(make, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, **LORA, lora_vision=True, lora_target_modules=["qkv"])
    loss, _, gradients = update(trainer, [make.group(make.prompt("What is seven?"), (4, 6), (1.0, -1.0))])
    assert loss != 0 and gradients == {}


# Weights in 4 bits


def test_what_is_quantized(checkpoint):
    """The decoder's linear layers, to nf4 with double quantization; all else is what the checkpoint holds."""
    whole, model = load_model(checkpoint), model_of(checkpoint, "qlora")
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    linear = (name for name, module in whole.named_modules() if isinstance(module, nn.Linear))
    assert set(quantized) == {name for name in linear if name.startswith(family_of(model).decoder_path)}
    for name, parameter in whole.named_parameters():
        if (layer := quantized.get(name.removesuffix(".weight"))) is not None:
            state = layer.weight.quant_state
            assert state.quant_type == "nf4" and state.nested
            near = dequantize_4bit(layer.weight, state)
            assert 0.08 < float((near - parameter).norm() / parameter.norm()) < 0.1  # of nf4 in blocks of 64
        else:
            assert torch.equal(model.get_parameter(name), parameter), name


@one_family()
def test_layers_compute_in_the_given_dtype(checkpoint, make):
    pack, logp = make_pack(groups_of(make)), []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(checkpoint, compute_dtype=dtype)
        assert model.model.language_model.layers[0].mlp.up_proj.compute_dtype == dtype
        logp.append(PackedPolicy(model, family_of(model), temperature=1.0).logprobs(pack))
    assert 1e-5 < float((logp[0] - logp[1]).abs().max()) < 0.1


def test_rows_that_are_no_multiple_of_the_blocks_are_refused_on_cpu(tmp_path, monkeypatch):
    """bitsandbytes reads them back wrongly there."""
    monkeypatch.setitem(families.TEXT, "intermediate_size", 96)
    folder = families.build("qwen2_5_vl", tmp_path)
    with pytest.raises(SettingError, match=r"multiple of 64: model.language_model.layers.0.mlp.down_proj has 96"):
        load_model(folder, compute_dtype=torch.float32)


DISAGREE = {"qlora": "False, and the model is", "lora": "True, and the model is not"}


@one_family()
@pytest.mark.parametrize(("kind", "said"), DISAGREE.items())
def test_the_setting_and_the_model_must_agree(kind, said, checkpoint, processor, tmp_path):
    settings = LORA | {"load_in_4bit": kind == "lora"}
    with pytest.raises(SettingError, match=f"load_in_4bit is {said} quantized"):
        trainer_of(model_of(checkpoint, kind), processor, tmp_path, **settings)
