"""LoRA in every model family: the shared step is the naive step, rollouts draw from the adapted model, and the
reference is the model without its adapter."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.families import FAMILIES, build
from tests.helpers.lora_steps import LORA, assert_rollouts_are_adapted, step, trainer_of
from tests.helpers.maker import Maker
from tests.helpers.steps import NAIVE, assert_equal_steps
from vlmr1.config import GRPOConfig
from vlmr1.errors import SettingError
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.models import family_of, load_model, load_processor
from vlmr1.models.lora import merged, with_lora
from vlmr1.models.settings import ParameterSettings
from vlmr1.types import Group


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PNGs of noise."""
    folder = tmp_path_factory.mktemp("sizes")
    rng = np.random.default_rng(0)
    files = {}
    for name, (width, height) in {"middle": (84, 84), "wide": (112, 56)}.items():
        files[name] = folder / f"{name}.png"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(files[name])
    return files


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture
def model(folder: Path) -> Any:
    return load_model(folder)


@pytest.fixture
def processor(folder: Path) -> Any:
    return load_processor(folder)


def one_family(name: str = "qwen2_5_vl") -> pytest.MarkDecorator:
    return pytest.mark.parametrize("folder", [name], indirect=True)


def groups_of(make: Maker) -> list[Group]:
    """Made once: later calls draw other numbers."""
    return [
        make.group(make.prompt("Locate the digit 1.", ("wide",)), (6, 3)),
        make.group(make.prompt("What is seven?"), (4, 9)),
        make.group(make.prompt("Locate the digit 2.", ("middle", "wide")), (5, 1, 7)),
    ]


# The step


def test_shared_step_equals_naive(make, model, processor, tmp_path):
    """Every adapter weight has a gradient, nothing else has one, and it is the naive trainer's."""
    groups = groups_of(make)
    naive = step(trainer_of(model, processor, tmp_path, **LORA, **NAIVE), groups)
    trainer = trainer_of(model, processor, tmp_path, **LORA)
    layers, decoder = model.config.text_config.num_hidden_layers, family_of(model).decoder_path
    assert len(naive[2]) == 2 * layers * (6 if model.config.model_type == "glm4v" else 7)
    assert all("lora_" in name and decoder in name and gradient.norm() > 0 for name, gradient in naive[2].items())
    assert naive[0] != 0 and naive[1]["kl"] > 1e-3
    assert trainer.features is not None  # the tower is frozen
    assert_equal_steps(step(trainer, groups), naive)


VARIANTS = {
    "vision": {"lora_vision": True},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "some modules": {"lora_target_modules": ["q_proj", "down_proj"]},
    "merger": {"lora_modules_to_save": ["visual.merger"]},
    "copy": {"reference": "copy"},
    "split groups": {"tokens_per_pack": 64},
}


@one_family()
@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants_of_the_shared_step(settings, make, model, processor, tmp_path):
    groups = groups_of(make)
    naive = step(trainer_of(model, processor, tmp_path, **LORA, **settings | NAIVE), groups)
    plain = step(trainer_of(model, processor, tmp_path, **LORA), groups)
    trainer = trainer_of(model, processor, tmp_path, **LORA, **settings)
    found = step(trainer, groups)
    assert_equal_steps(found, naive)
    names = {name.removeprefix("base_model.model.") for name in found[2]}
    more = names - {name.removeprefix("base_model.model.") for name in plain[2]}
    if "lora_vision" in settings:
        assert more and all(name.startswith("model.visual.") and "lora_" in name for name in more)
        assert trainer.features is None
    elif "lora_modules_to_save" in settings:
        assert more and all(name.startswith("model.visual.merger.modules_to_save.") for name in more)
        assert trainer.features is None
    elif "use_dora" in settings:
        assert len(more) == 2 * 7 and all("lora_magnitude_vector" in name for name in more)
    else:
        assert not more
    if "lora_target_modules" in settings:
        assert {name.split(".lora_")[0].split(".")[-1] for name in names} == {"q_proj", "down_proj"}
    if "use_rslora" in settings:  # 8 / sqrt(4) instead of 8 / 4
        layer = trainer.policy.model.model.language_model.layers[0].self_attn.q_proj
        assert layer.scaling == {"default": 4.0}


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_activation_checkpointing(reentrant, make, model, processor, tmp_path):
    """Nothing before the first adapter needs a gradient, and the layers are recomputed all the same."""
    groups = groups_of(make)
    kept = step(trainer_of(model, processor, tmp_path, **LORA), groups)
    trainer = trainer_of(model, processor, tmp_path, **LORA)
    # As `Trainer.train` does with gradient_checkpointing.
    trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    calls: list[int] = []
    decoder = trainer.policy.model.get_decoder()
    decoder.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    assert_equal_steps(step(trainer, groups), kept)
    packs = len(trainer.runner.packs(groups))
    assert len(calls) == 3 * packs  # reference, policy, policy again


@one_family()
def test_the_head_is_frozen_and_the_loss_knows(make, model, processor, tmp_path, monkeypatch):
    trainer = trainer_of(model, processor, tmp_path, **LORA)
    assert not trainer.family.head(trainer.policy.model).weight.requires_grad
    needs = []
    monkeypatch.setattr("vlmr1.grpo.loss.linear_grpo_loss", _spy(needs))
    step(trainer, groups_of(make))
    full = GRPOTrainer(model, GRPOConfig(output_dir=str(tmp_path), use_cpu=True), [], processor, ["format"])
    step(full, groups_of(make))
    assert needs == [(True, False), (True, True)]


def _spy(needs: list) -> Any:
    from vlmr1_kernels import linear_grpo_loss

    def spied(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
        needs.append((hidden.requires_grad, weight.requires_grad))
        return linear_grpo_loss(hidden, weight, *args, **kwargs)

    return spied


# Rollouts


def test_rollouts_draw_from_the_adapted_model(make, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, **LORA)  # of a copy
    assert_rollouts_are_adapted(make, model, processor, trainer, ("wide",))


@pytest.mark.parametrize(
    "folder, variant", [("qwen3_vl", "lora"), ("qwen2_5_vl", "dora"), ("idefics3", "lora")], indirect=["folder"]
)
def test_a_merged_rollout_and_weights_restored(variant, make, model, processor, tmp_path):
    """Merged, the adapter layers compute with one product, and after it every weight is what it was."""
    settings = LORA | {"use_dora": variant == "dora", "lora_merge_rollout": True}
    trainer = trainer_of(model, processor, tmp_path, **settings)
    policy, pack = trainer.policy, make_pack(groups_of(make))
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    apart = policy.logprobs(pack)
    products: list[int] = []
    for name, module in trainer.model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda *_: products.append(1))
    with merged(trainer.model):
        torch.testing.assert_close(policy.logprobs(pack), apart, rtol=1e-4, atol=1e-4)
        assert products == []
        changed = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
        assert changed and all("base_layer.weight" in name for name in changed)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
    assert torch.equal(policy.logprobs(pack), apart) and products
    products.clear()
    trainer.rollout([make.prompt("What is seven?")])
    assert products == []  # the setting reaches the rollout
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


@one_family()
def test_weights_are_restored_where_a_merged_rollout_fails(make, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, **LORA)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(RuntimeError, match="no tokens"), merged(trainer.model):
        raise RuntimeError("no tokens")
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
    assert trainer.policy.model.model.language_model.layers[0].mlp.up_proj.merged_adapters == []


# Adapters


@one_family()
def test_adapters_are_float32_beside_bfloat16_weights(folder, processor, make, tmp_path):
    model = load_model(folder, dtype=torch.bfloat16)
    trainer = trainer_of(model, processor, tmp_path, **LORA, model_dtype="bfloat16")
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in trainer.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    _, _, gradients = step(trainer, groups_of(make))
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
