"""Processors where torchvision is not installed: image-only, from every place where a checkpoint keeps its parts. Which
family a checkpoint gets, and what is refused: by the configuration alone."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, Idefics3Processor, SmolVLMProcessor

from tests.helpers.families import assert_same, checkpoints, config_of, outputs
from vlmr1.errors import SettingError
from vlmr1.models import BY_TYPE, HOW_TO_ADD, check_dropout, family_for, load_model, load_processor
from vlmr1.models import processor as module
from vlmr1.models.processor import PROCESSOR_MAPPING, save_processor

SETTINGS = {"internvl": "image_seq_length", "idefics3": "image_seq_len", "smolvlm": "image_seq_len"}
checkpoint = checkpoints()


@pytest.fixture(autouse=True)
def no_torchvision(monkeypatch):
    monkeypatch.setattr(module, "is_torchvision_available", lambda: False)


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy, to change; the name says the family."""
    return Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name))


def test_image_only(folder):
    processor = load_processor(folder)
    assert processor.get_attributes() == ["image_processor", "tokenizer"]
    stock = {"smolvlm": Idefics3Processor}.get(folder.name, PROCESSOR_MAPPING[type(config_of(folder.name))])
    assert isinstance(processor, stock)
    if (name := SETTINGS.get(folder.name)) is not None:
        assert getattr(processor, name) == 4
    shown = outputs(processor)["input_ids"][0]
    assert int((shown == processor.image_token_id).sum()) == (12 if folder.name in SETTINGS else 8)


def test_saved_and_read_again(folder, tmp_path):
    processor = load_processor(folder)
    saved = tmp_path / "saved"
    save_processor(processor, saved)
    shutil.copy(folder / "config.json", saved)
    assert_same(load_processor(saved), processor)
    written = json.loads((saved / "processor_config.json").read_text())
    stock = PROCESSOR_MAPPING[type(config_of(folder.name))].__name__  # what AutoProcessor reads
    assert written["processor_class"] == stock
    if (name := SETTINGS.get(folder.name)) is not None:
        assert written[name] == 4
    image_processor = json.loads((saved / "preprocessor_config.json").read_text())
    assert image_processor["image_processor_type"] == processor.image_processor.to_dict()["image_processor_type"]


def test_pickled(folder):
    """Loader workers that are spawned receive one."""
    processor = load_processor(folder)
    assert_same(pickle.loads(pickle.dumps(processor)), processor)


def into_tokenizer_config(folder: Path, template: str) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))


def into_legacy_file(folder: Path, template: str) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


@pytest.mark.parametrize("move", [into_tokenizer_config, into_legacy_file], ids=lambda move: move.__name__)
def test_chat_template_of_older_checkpoints(move, folder):
    expected = load_processor(folder)
    path = folder / "chat_template.jinja"
    template = path.read_text()
    path.unlink()
    assert load_processor(folder).chat_template is None
    move(folder, template)
    assert_same(load_processor(folder), expected)


def test_older_layout(folder):
    """Image processor and settings in files of their own, and the image processor of torchvision, as before
    transformers 5."""
    expected = load_processor(folder)
    path = folder / "processor_config.json"
    written = json.loads(path.read_text())
    del written["image_processor"]
    path.write_text(json.dumps(written))
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor_type"] += "Fast"
    path.write_text(json.dumps(settings))
    assert_same(load_processor(folder), expected)


@pytest.mark.parametrize("place", ["video_preprocessor_config.json", "processor_config.json"])
def test_settings_of_videos_are_kept(place, folder, tmp_path):
    """From both places where a base has them, over two generations of checkpoints."""
    settings = {"video_processor_type": "SomeVideoProcessor", "max_frames": 7, "size": {"longest_edge": 99}}
    written = json.loads((folder / place).read_text()) if (folder / place).exists() else {}
    nested = {"video_processor": settings} if place == "processor_config.json" else settings
    (folder / place).write_text(json.dumps(written | nested))
    for generation in ("first", "second"):
        saved = tmp_path / generation
        save_processor(load_processor(folder), saved)
        assert json.loads((saved / "video_preprocessor_config.json").read_text()) == settings
        assert "video_processor" not in json.loads((saved / "processor_config.json").read_text())
        shutil.copy(folder / "config.json", saved)
        folder = saved


def test_stock_processor_where_torchvision_is(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(module.AutoProcessor, "from_pretrained", lambda *args, **kwargs: calls.append((args, kwargs)))
    load_processor("some/model", revision="abc", trust_remote_code=False)
    assert calls == [(("some/model",), {"revision": "abc", "trust_remote_code": False})]


@pytest.mark.parametrize("rows, columns", [(0, 0), (1, 2), (3, 2)])
def test_smolvlm_writes_what_idefics3_writes(rows, columns):
    tokens = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "image_seq_len": 3}
    tokens |= {"global_image_tag": "<global-img>", "global_image_token": "<global-img>"}
    inputs = {"rows": [[rows]], "cols": [[columns]]}
    one, other = (
        stock.replace_image_token(SimpleNamespace(**tokens), inputs, 0)
        for stock in (Idefics3Processor, SmolVLMProcessor)
    )
    assert one == other and one.count("<image>") == 3 * (rows * columns + 1)


# The family of a checkpoint


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
