"""What a model's digest covers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vlmr1.errors import SettingError
from vlmr1.evaluation.fingerprint import model_digest

SIZE = 700_000  # values of a tensor: 2.8 MB, so that the middle one is in neither the first nor the last MiB


def save(folder: Path, changed: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {name: torch.arange(SIZE, dtype=torch.float32) for name in ("a", "b", "c")}
    if changed is not None:
        tensors[changed] += 1
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_each_tensor_counts(tmp_path):
    digests = [model_digest(save(tmp_path / str(name), name)) for name in (None, "a", "b", "c")]
    assert len(set(digests)) == 4
    assert model_digest(save(tmp_path / "again")) == digests[0]


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model", "modeling_x.py", "pytorch_model.bin"])
def test_each_file_counts(name, tmp_path):
    folder = save(tmp_path / "model")
    seen = {model_digest(folder)}
    for middle in (b"1", b"2"):
        (folder / name).write_bytes(bytes(2**21) + middle + bytes(2**21))
        seen.add(model_digest(folder))
    assert len(seen) == 3


def test_the_base_of_an_adapter_counts(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"lora": torch.ones(3)}, adapter / "adapter_model.safetensors")
    base = save(tmp_path / "base")
    config = {"base_model_name_or_path": str(base), "r": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    seen = {model_digest(adapter)}
    save(base, "b")
    seen.add(model_digest(adapter))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 16}))
    seen.add(model_digest(adapter))
    assert len(seen) == 3


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 16, b"\x04" + bytes(7) + b"{{{{"], ids=repr)
def test_what_is_no_safetensors_file(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(SettingError, match=r"model\.safetensors is no whole safetensors file"):
        model_digest(tmp_path)
