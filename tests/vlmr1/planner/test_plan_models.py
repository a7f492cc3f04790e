"""Configurations that ship, and parameters counted on models without data."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.helpers.families import FAMILIES, config_of
from tests.helpers.jobs import args_of, job
from tests.helpers.slow import mostly_slow
from vlmr1.errors import SettingError
from vlmr1.models import load_model
from vlmr1.models.lora import base_of
from vlmr1.models.quantization import scales_of
from vlmr1.models.trainable import planned_model
from vlmr1.planner.dry_run import DryRun
from vlmr1.planner.known_models import config_named, known_models
from vlmr1.planner.plan import model_without_data
from vlmr1.tiny import CHECKPOINT


def without_data(config: Any, **settings: Any) -> Any:
    return base_of(model_without_data(job(config, **settings), DryRun("a")))


# Published totals, in billions.
TOTALS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 3.75,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
    "Qwen/Qwen2.5-VL-32B-Instruct": 33.45,
    "Qwen/Qwen2.5-VL-72B-Instruct": 73.41,
    "Qwen/Qwen3-VL-2B-Instruct": 2.13,
    "Qwen/Qwen3-VL-4B-Instruct": 4.44,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77,
    "Qwen/Qwen3-VL-32B-Instruct": 33.36,
    "OpenGVLab/InternVL3-2B-hf": 2.09,
    "OpenGVLab/InternVL3-8B-hf": 7.94,
}


@pytest.mark.parametrize("name", mostly_slow(known_models(), "Qwen/Qwen2.5-VL-3B-Instruct"))
def test_totals_are_the_published_ones(name):
    model = planned_model(config_named(name), args_of())
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == TOTALS[name]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_equal_those_of_the_real_model(family):
    """Those that are tied are listed once."""
    config = config_of(family)
    real = AutoModelForImageTextToText.from_config(config)
    planned = without_data(config)
    found, expected = (
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} for model in (planned, real)
    )
    assert found == expected


NAMES = {"Qwen/Qwen2.5-VL-7B-Instruct": 3584, "Qwen2.5-VL-7B-Instruct": 3584, str(CHECKPOINT): 192}


@pytest.mark.parametrize(("name", "size"), NAMES.items(), ids=["hub id", "last part", "directory"])
def test_names_of_models(name, size):
    assert config_named(name).get_text_config().hidden_size == size


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(SettingError, match=r"no local directory.*fetches nothing.*Qwen/Qwen2.5-VL-72B-Instruct"):
        config_named("Qwen/Qwen9-VL")


def test_lora_has_two_matrices_a_linear_layer_of_the_decoder():
    config = config_named(str(CHECKPOINT))
    model = without_data(config, use_peft=True, lora_r=8, model_dtype="bfloat16")
    text = config.get_text_config()
    width, heads = text.hidden_size, text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    ends = 2 * [(width, width)] + 2 * [(width, heads)] + 3 * [(width, text.intermediate_size)]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 8 * text.num_hidden_layers * sum(a + b for a, b in ends)
    assert {p.dtype for p in trained} == {torch.float32}
    assert all("language_model" in name for name, p in model.named_parameters() if p.requires_grad)


def test_four_bit_weights_are_those_of_a_model_that_is_loaded():
    """Packed weights, scales and the rest: the same tensors, byte for byte, and the same layers."""

    def described(model: Any) -> dict[str, tuple[Any, ...]]:
        found: dict[str, Any] = {}
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parts = {"": parameter, **scales_of(parameter)}
                found[name.replace(".base_layer", "")] = [(k, tuple(t.shape), t.dtype) for k, t in parts.items()]
        return found

    real = load_model(CHECKPOINT, dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    settings = {"use_peft": True, "load_in_4bit": True, "model_dtype": "bfloat16", "bf16": True}
    planned = without_data(config_named(str(CHECKPOINT)), **settings)
    assert described(planned) == described(real)
    packed = [name for name, parameter in planned.named_parameters() if scales_of(parameter)]
    assert len(packed) == 7 * real.config.get_text_config().num_hidden_layers
    assert all("language_model" in name for name in packed)
