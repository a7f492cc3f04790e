"""Vision towers that attend by `varlen_attention` give what they give by themselves."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

import vlmr1_kernels
from tests.helpers.families import config_of
from vlmr1.errors import SettingError
from vlmr1.models import family_of, load_model, tower
from vlmr1.models.tower import NAME, varlen_tower
from vlmr1.planner.job import image_of
from vlmr1.tiny import CHECKPOINT
from vlmr1_kernels.testing import relative_error

GRID = torch.tensor([[1, 8, 8], [1, 6, 10], [1, 4, 4], [1, 2, 6]])  # images of different sizes, in patches


class Operators(TorchDispatchMode):
    """Names of the operators that run in this block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


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


# Patches, and waits for the device


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind, kernel, shape", [(nn.Conv2d, 4, (3, 8, 15)), (nn.Conv3d, (2, 4, 4), (3, 2, 4, 8))])
def test_a_convolution_of_patches_is_a_matrix_product(kind, kernel, shape, bias):
    torch.manual_seed(0)
    conv = kind(3, 6, kernel, stride=kernel, bias=bias, dtype=torch.float64)
    pixels = torch.randn(5, *shape, dtype=torch.float64, requires_grad=True)
    inputs = (pixels, *conv.parameters())
    expected, ours = conv(pixels), tower._as_matmul(conv)(pixels)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(each, inputs, weight) for each in (ours, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "internvl"])
def test_a_pass_neither_waits_for_the_device_nor_convolves(name, monkeypatch):
    """Tensors of the meta device have no values: what reads one raises."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config_of(name))
    monkeypatch.setattr(tower, "varlen_attention", lambda q, *given, **options: q)
    images = [image_of(model.config, tokens)[0] for tokens in (4, 12)]
    family = family_of(model)
    with Operators() as seen, family.attention(model):
        features = family.encode_images(model, images)
    assert [each.rows.device.type for each in features] == ["meta", "meta"]
    assert len(seen.names) > 20 and not any("convolution" in each for each in seen.names)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_features_are_those_of_the_library(name):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config_of(name))
    images = [image_of(model.config, tokens)[0] for tokens in (4, 12, 30)]
    for image in images:
        image["pixel_values"].normal_()
    pixels, grids = (torch.cat([image[name] for image in images]) for name in ("pixel_values", "image_grid_thw"))
    expected = model.model.get_image_features(pixels, grids).pooler_output
    ours = family_of(model).encode_images(model, images)
    assert len(ours) == len(expected) == 3
    assert all(torch.equal(one.rows, other) for one, other in zip(ours, expected, strict=True))
