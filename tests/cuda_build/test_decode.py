"""A decode step of the native engine on CUDA tensors without data: its launches, and that it never waits."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from transformers import AutoModelForImageTextToText
from transformers.initialization import no_init_weights

from tests.cuda_build.harness import OnCuda, fake_cuda, on_stub
from tests.helpers.cuda_table import LIMITS
from tests.helpers.families import FAMILIES, config_of
from vlmr1.models import family_for
from vlmr1.models.attention import autocast
from vlmr1.models.lora import base_of, with_lora
from vlmr1.models.settings import LoraSettings
from vlmr1.planner.known_models import config_named
from vlmr1.rollout import NativeEngine, SamplingSettings
from vlmr1.rollout.decoder import DecodeForward
from vlmr1.rollout.engine import Request
from vlmr1.rollout.sampling import sample_tokens
from vlmr1.rollout.scheduler import Scheduler

CUDA = torch.device("cuda")
GROUPS, SIZE = 8, 8  # prompts, and completions of each
SAMPLING = {
    "default": {}, "greedy": {"greedy": True}, "temperature": {"temperature": 0.7}, "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9}, "min_p": {"min_p": 0.05}, "repetition_penalty": {"repetition_penalty": 1.1},
}  # fmt: skip


def model_of(config: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"), no_init_weights():
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def adapted(model: Any) -> Any:
    settings = SimpleNamespace(**vars(LoraSettings(use_peft=True)), freeze_vision=False, model_revision="main", seed=0)
    return base_of(with_lora(model, family_for(model.config), settings))  # type: ignore[arg-type]


def step_launches(model: Any, settings: SamplingSettings = SamplingSettings(256)) -> Counter[str]:  # noqa: B008
    """Launches of a decode step, by aten op or kernel; fails where the step would wait for the device."""
    family = family_for(model.config)
    assert DecodeForward.supports(model, family, torch.bfloat16) is None
    with fake_cuda():
        model.to_empty(device=CUDA)
        engine = NativeEngine(model, family, None, dtype=torch.bfloat16, ignore_eos=True)
        engine.decode_forward = DecodeForward(model, family, torch.bfloat16)
        decoder = model.config.get_text_config(decoder=True)
        dims = 3 if "mrope_section" in (decoder.rope_parameters or {}) else 1
        prompt = SimpleNamespace(input_ids=torch.zeros(1200), positions=torch.zeros(dims, 1200))
        request = Request([prompt] * GROUPS, SIZE, settings, 0)  # type: ignore[list-item]
        with torch.no_grad(), autocast(CUDA, torch.bfloat16), on_stub() as launches:
            scheduler = Scheduler(engine, request, engine.new_state(400), {})
            batch, draws = scheduler.new_batch(scheduler.limit), torch.zeros(GROUPS * SIZE, device=CUDA).double()
            with OnCuda(checked=False):  # autocast casts trained weights once, which the prefill makes it do
                scheduler.step(batch, draws)
            launches.clear()
            with OnCuda() as ops:
                scheduler.step(batch, draws)
    return Counter([*ops.kernels, *(name for name, _ in launches)])


def per_layer(name: str, change: Any) -> float:
    """Launches that one more decoder layer adds to a step."""
    totals = []
    for layers in (2, 4):
        config = config_named(name)
        text = config.get_text_config(decoder=True)
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        totals.append(step_launches(change(config)).total())
    return (totals[1] - totals[0]) / 2


COUNTED = {
    "Qwen2.5-VL, float32 weights": ("Qwen2.5-VL-3B-Instruct", lambda config: model_of(config, torch.float32)),
    "Qwen2.5-VL, bfloat16 weights": ("Qwen2.5-VL-3B-Instruct", lambda config: model_of(config, torch.bfloat16)),
    "Qwen2.5-VL, LoRA": ("Qwen2.5-VL-3B-Instruct", lambda config: adapted(model_of(config, torch.bfloat16))),
    "Qwen3-VL, float32 weights": ("Qwen3-VL-2B-Instruct", lambda config: model_of(config, torch.float32)),
}


@pytest.mark.parametrize("case", COUNTED)
def test_launches_of_a_decoder_layer(case: str, table: dict[str, Any]) -> None:
    table[case] = per_layer(*COUNTED[case])
    assert table[case] <= LIMITS[case]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_step_waits(family: str) -> None:
    assert step_launches(model_of(config_of(family), torch.float32))["mm"] > 0


def images_of(config: Any) -> list[dict[str, torch.Tensor]]:
    """Two images as a family's processor leaves them in host memory."""
    vision = config.vision_config
    if not hasattr(vision, "temporal_patch_size"):
        tiles = torch.zeros(4, 3, 56, 56)
        return [{"pixel_values": tiles[None] if "scale_factor" in config.to_dict() else tiles}] * 2
    columns = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return [{"pixel_values": torch.zeros(48, columns), "image_grid_thw": torch.tensor([[1, 6, 8]])}] * 2


# The stock forward leaves out tiles of padding, which it looks for in the pixels.
WAITS = pytest.mark.xfail(raises=DynamicOutputShapeException, strict=True, reason="padding is looked for in pixels")
TOWERS = [pytest.param(name, marks=[WAITS] if name in ("idefics3", "smolvlm") else []) for name in FAMILIES]


@pytest.mark.parametrize("name", TOWERS)
def test_no_tower_waits(name: str) -> None:
    config = config_of(name)
    model, family, images = model_of(config, torch.float32), family_for(config), images_of(config)
    with fake_cuda(), torch.no_grad(), autocast(CUDA, torch.bfloat16), on_stub():
        model.to_empty(device=CUDA)
        with family.attention(model), OnCuda(moves=True) as ops:
            features = family.encode_images(model, images)
    assert len(features) == 2 and features[0].rows.device.type == "cuda" and "addmm" in ops.kernels


@pytest.mark.parametrize("name", SAMPLING)
def test_no_sampling_waits(name: str, table: dict[str, Any]) -> None:
    settings = replace(SamplingSettings(256), **SAMPLING[name])
    with fake_cuda(), on_stub() as launches, OnCuda() as ops:
        logits = torch.empty(64, 151_936, device=CUDA)
        seen = torch.empty(64, 151_936, dtype=torch.bool, device=CUDA) if name == "repetition_penalty" else None
        suppressed, draws = torch.empty(4, dtype=torch.int64, device=CUDA), torch.empty(64, device=CUDA).double()
        before = len(ops.kernels)
        tokens, *logps = sample_tokens(logits, suppressed, settings, draws, seen)
    assert (tokens.dtype, tokens.shape) == (torch.int64, (64,))
    assert all((each.dtype, each.shape) == (torch.float32, (64,)) for each in logps)
    table[f"sampling, {name}"] = len(ops.kernels) - before + len(launches)
