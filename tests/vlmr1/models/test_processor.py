"""Processors where torchvision is not installed: image-only, from every place where a checkpoint keeps its parts."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Idefics3Processor, SmolVLMProcessor

from tests.helpers.families import FAMILIES, build
from vlmr1.models import load_processor
from vlmr1.models import processor as module
from vlmr1.models.processor import PROCESSOR_MAPPING, save_processor

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is it?"}]}]
SETTINGS = {"internvl": "image_seq_length", "idefics3": "image_seq_len", "smolvlm": "image_seq_len"}


@pytest.fixture(autouse=True)
def no_torchvision(monkeypatch):
    monkeypatch.setattr(module, "is_torchvision_available", lambda: False)


@pytest.fixture(scope="session", params=FAMILIES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp("processors") / request.param)


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy, to change; the name says the family."""
    return Path(shutil.copytree(built, tmp_path / built.name))


def outputs(processor: Any) -> dict[str, torch.Tensor]:
    text = processor.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    images = [Image.linear_gradient("L").convert("RGB").resize((112, 56))]
    return dict(processor(text=[text], images=images, return_tensors="pt"))


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other) and one.chat_template == other.chat_template
    first, second = outputs(one), outputs(other)
    assert first.keys() == second.keys() and len(first) >= 3
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_image_only(folder):
    processor = load_processor(folder)
    assert processor.get_attributes() == ["image_processor", "tokenizer"]
    stock = {"smolvlm": Idefics3Processor}.get(folder.name, PROCESSOR_MAPPING[type(config_of(folder))])
    assert isinstance(processor, stock)
    if (name := SETTINGS.get(folder.name)) is not None:
        assert getattr(processor, name) == 4
    shown = outputs(processor)["input_ids"][0]
    assert int((shown == processor.image_token_id).sum()) == {"internvl": 12, "idefics3": 12, "smolvlm": 12}.get(
        folder.name, 8
    )


def config_of(folder: Path) -> Any:
    return module.AutoConfig.from_pretrained(folder)


def test_saved_and_read_again(folder, tmp_path):
    processor = load_processor(folder)
    saved = tmp_path / "saved"
    save_processor(processor, saved)
    shutil.copy(folder / "config.json", saved)
    assert_same(load_processor(saved), processor)
    written = json.loads((saved / "processor_config.json").read_text())
    assert written["processor_class"] == PROCESSOR_MAPPING[type(config_of(folder))].__name__  # what AutoProcessor reads
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
