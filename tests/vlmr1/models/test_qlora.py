"""Weights in 4 bits with an adapter: the decoder's linear layers only, the same step as the naive trainer, and rollouts
from the very model that is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn

from tests.helpers import families
from tests.helpers.lora_steps import LORA, assert_rollouts_are_adapted, step, trainer_of
from tests.helpers.maker import Maker
from tests.helpers.steps import NAIVE, assert_equal_steps
from vlmr1.errors import SettingError
from vlmr1.grpo.packing import make_pack
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models import family_of, load_model, load_processor
from vlmr1.types import Group

QLORA = LORA | {"load_in_4bit": True}


@pytest.fixture(scope="module", params=families.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an inner width that is a multiple of the blocks of 64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.TEXT, "intermediate_size", 128)
        return families.build(request.param, tmp_path_factory.mktemp("families") / request.param)


@pytest.fixture
def model(folder: Path) -> Any:
    return load_model(folder, compute_dtype=torch.float32)


@pytest.fixture
def processor(folder: Path) -> Any:
    return load_processor(folder)


def groups_of(make: Maker) -> list[Group]:
    return [
        make.group(make.prompt("Locate the digit 1.", (112,)), (6, 3)),
        make.group(make.prompt("What is seven?"), (4, 9)),
        make.group(make.prompt("Locate the digit 2.", (56, 84)), (5, 1, 7)),
    ]


def test_what_is_quantized(folder, model):
    """The decoder's linear layers, to nf4 with double quantization; all else is what the checkpoint holds."""
    whole, family = load_model(folder), family_of(model)
    quantized = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    linear = (name for name, module in whole.named_modules() if isinstance(module, nn.Linear))
    assert set(quantized) == {name for name in linear if name.startswith(family.decoder_path)}
    for name, parameter in whole.named_parameters():
        if name.removesuffix(".weight") in quantized:
            state = quantized[name.removesuffix(".weight")].weight.quant_state
            assert state.quant_type == "nf4" and state.nested
            near = dequantize_4bit(quantized[name.removesuffix(".weight")].weight, state)
            assert 0.08 < float((near - parameter).norm() / parameter.norm()) < 0.1  # of nf4 in blocks of 64
        else:
            assert torch.equal(model.get_parameter(name), parameter), name


def test_shared_step_equals_naive(make, model, processor, tmp_path):
    groups = groups_of(make)
    naive = step(trainer_of(model, processor, tmp_path, **QLORA, **NAIVE), groups)
    assert naive[0] != 0 and naive[1]["kl"] > 1e-3
    assert all("lora_" in name and gradient.norm() > 0 for name, gradient in naive[2].items())
    assert_equal_steps(step(trainer_of(model, processor, tmp_path, **QLORA), groups), naive)


def test_rollouts_draw_from_the_adapted_model(make, model, processor, tmp_path):
    """And the 4-bit weights are afterwards what they were."""
    trainer = trainer_of(model, processor, tmp_path, **QLORA)  # of a copy
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    assert_rollouts_are_adapted(make, model, processor, trainer, (112,))
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


@pytest.mark.parametrize("folder", ["qwen2_5_vl"], indirect=True)
def test_layers_compute_in_the_given_dtype(folder, make):
    pack = make_pack(groups_of(make))
    logp = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, compute_dtype=dtype)
        assert model.model.language_model.layers[0].mlp.up_proj.compute_dtype == dtype
        logp[dtype] = PackedPolicy(model, family_of(model), temperature=1.0).logprobs(pack)
    assert 1e-5 < float((logp[torch.float32] - logp[torch.bfloat16]).abs().max()) < 0.1


def test_rows_that_are_no_multiple_of_the_blocks_are_refused_on_cpu(tmp_path):
    """bitsandbytes reads them back wrongly there."""
    folder = families.build("qwen2_5_vl", tmp_path)
    with pytest.raises(SettingError, match=r"multiple of 64: model.language_model.layers.0.mlp.down_proj has 96"):
        load_model(folder, compute_dtype=torch.float32)


@pytest.mark.parametrize("folder", ["qwen2_5_vl"], indirect=True)
def test_the_setting_and_the_model_must_agree(folder, model, processor, tmp_path):
    with pytest.raises(SettingError, match="load_in_4bit is False, and the model is quantized to 4 bits"):
        trainer_of(model, processor, tmp_path, **LORA)
    with pytest.raises(SettingError, match="load_in_4bit is True, and the model is not quantized"):
        trainer_of(load_model(folder), processor, tmp_path, **QLORA)
