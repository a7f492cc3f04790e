"""Which family a checkpoint gets, and what is refused: by the configuration alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from vlmr1.errors import SettingError
from vlmr1.models import BY_TYPE, HOW_TO_ADD, check_dropout, family_for, load_model

SUPPORTED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "glm4v", "idefics3", "smolvlm"}


def config(model_type: str, **decoder: Any) -> Any:
    """The library's default configuration, with some of the decoder's settings given."""
    given = AutoConfig.for_model(model_type)
    for name, value in decoder.items():
        setattr(given.get_text_config(decoder=True), name, value)
    return given


def written(folder: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_families():
    assert set(BY_TYPE) == SUPPORTED
    for model_type, kind in BY_TYPE.items():
        family = family_for(config(model_type))
        assert type(family) is kind and model_type in family.model_types


SLIDES = "has layers of sliding_attention, which only sees a part"
REFUSED = {
    "linear attention": ("qwen3_5", {}, "qwen3_5 has layers of linear_attention, which would read one branch"),
    "experts": ("qwen3_vl_moe", {}, "qwen3_vl_moe routes tokens to experts (num_experts), which was not tested"),
    "experts of GLM": ("glm4v_moe", {}, "glm4v_moe routes tokens to experts (num_local_experts), which was not tested"),
    "some layers slide": ("gemma3", {}, f"gemma3 {SLIDES}"),
    "all layers slide": ("internvl", {"layer_types": ["sliding_attention"] * 2}, f"internvl {SLIDES}"),
    "a window and no kinds of layers": ("smolvlm", {"sliding_window": 64}, f"smolvlm {SLIDES}"),
    "chunks": ("internvl", {"layer_types": ["chunked_attention"]}, "internvl has layers of chunked_attention"),
    "experts in a known family": ("internvl", {"num_local_experts": 8}, "internvl routes tokens to experts"),
    "another family": ("llava", {}, "llava is not supported, only qwen2_vl, qwen2_5_vl, qwen3_vl"),
    "no images": ("llama", {}, "llama is not supported"),
}


@pytest.mark.parametrize("model_type, decoder, message", REFUSED.values(), ids=REFUSED.keys())
def test_refused(model_type, decoder, message):
    """In one line that says why, and where adding a family is described."""
    with pytest.raises(SettingError) as refusal:
        family_for(config(model_type, **decoder))
    text = str(refusal.value)
    assert text.startswith(f"model_name_or_path: {message}") and text.endswith(HOW_TO_ADD)
    assert (Path(__file__).parents[3] / HOW_TO_ADD.split()[0]).is_file()


def test_path_has_no_part_in_the_choice(tmp_path):
    """A directory named after one family with the configuration of another."""
    path = written(tmp_path / "qwen2_5_vl-something", {"model_type": "llava"})
    with pytest.raises(SettingError, match="model_name_or_path: llava"):
        load_model(path)
    other = written(tmp_path / "llava-something", config("internvl").to_dict())
    assert family_for(AutoConfig.from_pretrained(other)).model_types == ("internvl",)
    with pytest.raises(SettingError, match=r"model_name_or_path: .*model\.safetensors"):  # only its weights are missing
        load_model(other)


UNREADABLE = {
    "unknown type": ({"model_type": "no_such_model"}, "model_name_or_path: .*`no_such_model`"),
    "no type": ({"hidden_size": 8}, "model_name_or_path: .*model_type"),
}


@pytest.mark.parametrize("settings, message", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_unreadable(settings, message, tmp_path):
    with pytest.raises(SettingError, match=message) as refusal:
        load_model(written(tmp_path / "model", settings))
    assert str(refusal.value).endswith(HOW_TO_ADD) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("model_type", sorted(SUPPORTED))
def test_dropout(model_type):
    check_dropout(config(model_type))
    with pytest.raises(SettingError, match=r"share_prompt and pack .* attention_dropout is 0\.1: set both to false"):
        check_dropout(config(model_type, attention_dropout=0.1))
