"""`quantization_config` as QLoRA scripts of TRL give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, GPTQConfig

from tests.helpers.api import trainer_of
from vlmr1.errors import SettingError
from vlmr1.models import load_model
from vlmr1.models.lora import base_of
from vlmr1.tiny import CHECKPOINT

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
FP4 = dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)  # the library's defaults: fp4, scales in float32
NF4 = FP4 | dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
HOW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # arguments of the trainer, settings
    "argument": (dict(quantization_config=BitsAndBytesConfig(**FP4)), {}),
    "kwargs": ({}, dict(model_init_kwargs=dict(quantization_config=BitsAndBytesConfig(**NF4), device_map={"": 0}))),
    "loaded": (dict(model=BitsAndBytesConfig(**NF4)), {}),
}


def weights_in_4bit(model: Any) -> dict[str, Any]:
    return {name: each for name, each in model.named_parameters() if hasattr(each, "quant_state")}


def alternating(completions: list[Any], **_: Any) -> list[float]:
    return [float(i % 2) for i, _ in enumerate(completions)]


@pytest.mark.parametrize(("given", "settings"), HOW.values(), ids=HOW.keys())
@pytest.mark.slow
def test_a_model_in_4_bits_is_trained_by_its_adapter(
    given: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """As asked, in the decoder alone, or where the given model is quantized; the checkpoint says how, so that its base
    model is the same again."""
    loaded = "model" in given
    if loaded:
        model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, quantization_config=given["model"])
        given = dict(model=model)
    known: dict[str, Any] = dict(model=str(CHECKPOINT), peft_config=LORA, processing_class=None)
    known["reward_funcs"] = alternating
    trainer = trainer_of(CHECKPOINT, tmp_path, known | given, max_steps=1, temperature=3.0, **settings)
    packed = weights_in_4bit(trainer.model)
    decoder = [name for name in packed if "language_model" in name]
    assert len(decoder) == 7 * base_of(trainer.model).config.get_text_config().num_hidden_layers
    assert (len(packed) > len(decoder)) == loaded
    kind = "fp4" if "quantization_config" in given else "nf4"
    assert {(w.quant_state.quant_type, w.quant_state.nested) for w in packed.values()} == {(kind, kind == "nf4")}
    before = {name: each.clone() for name, each in trainer.model.named_parameters() if each.requires_grad}
    trainer.train()
    assert all("lora_" in name and each.dtype == torch.float32 for name, each in before.items())
    assert [name for name, each in before.items() if torch.equal(each, trainer.model.get_parameter(name))] == [
        name
        for name in before
        if "lora_A" in name  # B begins as 0
    ]
    trainer.save_model(str(tmp_path / "final"))
    again = weights_in_4bit(load_model(tmp_path / "final"))
    assert len(again) == len(packed)
    assert all(torch.equal(a, b) for a, b in zip(packed.values(), again.values(), strict=True))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "8_bits": (dict(quantization_config=BitsAndBytesConfig(load_in_8bit=True)), "load_in_4bit=False"),
    "method": (dict(quantization_config=GPTQConfig(4, tokenizer="t")), "quantization_config is a GPTQConfig"),
    "no_adapter": (dict(quantization_config=BitsAndBytesConfig(**NF4), peft_config=None), "needs peft_config"),
    "storage": (
        dict(quantization_config=BitsAndBytesConfig(**NF4, bnb_4bit_quant_storage="bfloat16")),
        "bnb_4bit_quant_storage=bfloat16",
    ),
    "adapter": (dict(peft_config=dict(r=4)), "peft_config is a dict"),
}


@pytest.mark.parametrize(("given", "words"), WRONG.values(), ids=WRONG.keys())
def test_quantization_that_is_refused(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=words):
        trainer_of(CHECKPOINT, tmp_path, dict(peft_config=LORA) | given)


def test_a_model_in_8_bits_is_refused(tmp_path: Path) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    model.is_loaded_in_8bit = True  # as bitsandbytes marks it
    with pytest.raises(SettingError, match="8 bits"):
        trainer_of(CHECKPOINT, tmp_path, dict(model=model, peft_config=LORA))


def test_two_quantizations_are_refused(tmp_path: Path) -> None:
    asked = BitsAndBytesConfig(**NF4)
    given = dict(peft_config=LORA, quantization_config=asked)
    with pytest.raises(SettingError, match="give it in one place"):
        trainer_of(CHECKPOINT, tmp_path, given, model_init_kwargs=dict(quantization_config=asked))


def test_an_adapter_is_not_merged_into_4_bit_weights(tmp_path: Path) -> None:
    given = dict(model=str(CHECKPOINT), peft_config=LORA, quantization_config=BitsAndBytesConfig(**NF4))
    settings: dict[str, Any] = dict(lora_merge_rollout=True, model_init_kwargs={"dtype": "bfloat16"})
    with pytest.raises(SettingError, match=r"^lora_merge_rollout cannot be used with load_in_4bit"):
        trainer_of(CHECKPOINT, tmp_path, given, **settings)
