"""Vision towers that attend by `varlen_attention` give what they give by themselves."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

import vlmr1_kernels
from tests.helpers.families import config_of
from vlmr1.errors import SettingError
from vlmr1.models import load_model, tower
from vlmr1.models.tower import NAME, varlen_tower
from vlmr1.tiny import CHECKPOINT
from vlmr1_kernels.testing import relative_error

GRID = torch.tensor([[1, 8, 8], [1, 6, 10], [1, 4, 4], [1, 2, 6]])  # images of different sizes, in patches


def shipped() -> Any:
    return load_model(CHECKPOINT).model.visual


def tower_of(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config_of(family)).model.visual


def patches(model: nn.Module) -> Tensor:
    config: Any = model.config
    size = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return torch.randn(int(GRID.prod(1).sum()), size, generator=torch.Generator().manual_seed(3))


def results(model: nn.Module, pixels: Tensor, varlen: bool) -> dict[str, Tensor]:
    """The features and the gradient of every parameter, of a random projection of the features."""
    model.zero_grad()
    with varlen_tower(model) if varlen else nullcontext():
        features = model(pixels, GRID).pooler_output
        weight = torch.randn(features.shape, generator=torch.Generator().manual_seed(4))
        (features.float() * weight).sum().backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"features": features.detach(), **gradients}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each call."""
    seen: list[int] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_length: int, **options: Any) -> Tensor:
        assert isinstance(max_length, int)
        seen.append(len(cu_seqlens) - 1)
        return vlmr1_kernels.varlen_attention(q, k, v, cu_seqlens, max_length, **options)

    monkeypatch.setattr(tower, "varlen_attention", spy)
    return seen


@pytest.mark.parametrize("name", ["shipped", "qwen2_vl", "qwen3_vl", "glm4v"])
def test_equals_the_tower(name, calls):
    model = (shipped() if name == "shipped" else tower_of(name)).train()
    pixels = patches(model)
    expected = results(model, pixels, varlen=False)
    assert not calls
    ours = results(model, pixels, varlen=True)
    assert len(calls) == model.config.depth
    assert ours.keys() == expected.keys() and len(ours) > 10
    assert [name for name, value in expected.items() if relative_error(ours[name], value) >= 1e-6] == []
    assert model.config._attn_implementation == "sdpa"


def test_windows_are_sequences(calls):
    model = shipped()
    with torch.no_grad(), varlen_tower(model):
        model(patches(model), GRID)
    windows = 4 + 2 * 3 + 1 + 2  # of 4 x 4 patches, by image
    assert calls == [windows, 4, windows, 4]


def test_checkpointing(calls):
    model = shipped().train()
    pixels = patches(model)
    expected = results(model, pixels, varlen=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ours = results(model, pixels, varlen=True)
    assert len(calls) == 2 * model.config.depth, "once in forward, once in backward"
    assert [name for name, value in expected.items() if relative_error(ours[name], value) >= 1e-6] == []


def test_autocast():
    """RoPE leaves q and k in float32 there, v is bfloat16."""
    model = shipped()
    pixels = patches(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = results(model, pixels, varlen=True)["features"]
        plain = results(model, pixels, varlen=False)["features"]
    truth = results(model, pixels, varlen=False)["features"]
    assert ours.dtype == plain.dtype
    assert relative_error(ours, truth) < 1.2 * relative_error(plain, truth)


def test_restored_after_an_error():
    model = shipped()
    with pytest.raises(KeyError), varlen_tower(model):
        assert model.config._attn_implementation == NAME
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_dropout_is_refused():
    model = shipped().train()
    for block in model.blocks:
        block.attn.attention_dropout = 0.1
    with pytest.raises(SettingError, match=r"attention dropout \(0.1\)"), varlen_tower(model):
        model(patches(model), GRID)
