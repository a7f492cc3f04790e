"""The decode step's own forward, against the stock forward of every family: bits, error, launches and casts."""

import sys
from copy import deepcopy
from functools import lru_cache
from math import prod
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tests.helpers import interpreter
from tests.helpers.families import FAMILIES, HIDDEN, checkpoints, config_of, one_family
from tests.helpers.limits import limit_of
from tests.helpers.ops_counted import OpsCounted, kernels_counted
from tests.helpers.rollouts import completions
from tests.helpers.slow import mostly_slow
from vlmr1.models import family_of
from vlmr1.models.attention import autocast
from vlmr1.rollout import NativeEngine, SamplingSettings
from vlmr1.rollout.decoder import DecodeForward, LigerLayers, TorchLayers, functions_on
from vlmr1.rollout.decoder_weights import copied_bytes
from vlmr1.rollout.kv_cache import KVCache
from vlmr1.rollout.sequences import Batch
from vlmr1_kernels import use
from vlmr1_kernels.testing import assert_within_budget

pytestmark = pytest.mark.usefixtures("_without_grad")
checkpoint = checkpoints()
ROWS = (3, 17, 32, 1, 0)  # cached tokens of five branches, of two groups
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")


@pytest.fixture
def _without_grad() -> Any:
    with torch.no_grad():
        yield


@lru_cache(maxsize=2)
def _built(name: str) -> Any:
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config_of(name)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    return model


def model_of(name: str, *, layers: int | None = None, dtype: torch.dtype = torch.float32, lora: str = "") -> Any:
    """A model with random weights, biases and norms; with an adapter, which may be merged."""
    model = deepcopy(_built(name)).to(dtype)
    decoder = attrgetter(family_of(model).decoder_path)(model)
    decoder.layers = decoder.layers[:layers]
    if lora:
        from peft import LoraConfig, get_peft_model

        options: dict[str, Any] = {"lora_alpha": 5, "target_modules": list(PROJECTIONS), "init_lora_weights": False}
        adapted: Any = get_peft_model(model, LoraConfig(r=3, **options))
        if lora == "merged":
            for module in adapted.modules():
                if hasattr(module, "lora_A"):
                    module.merge(safe_merge=True)
        model = adapted.get_base_model()
    return model


def batch_of(model: Any, dtype: torch.dtype) -> Batch:
    """A step of five branches over a cache with random numbers."""
    config = model.config.get_text_config(decoder=True)
    generator = torch.Generator().manual_seed(5)
    cache = KVCache(config, 20, device=model.device, dtype=dtype)
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    dims = 3 if "mrope_section" in config.rope_parameters else 1
    batch = Batch(cache, rows=5, groups=2, columns=3, position_dims=dims, max_group=3, max_prefix=20)
    tables = (
        (batch.attention.group_offsets, [0, 3, 5]), (batch.attention.prefix_starts, [0, 32]),
        (batch.attention.prefix_lengths, [20, 9]), (batch.attention.suffix_lengths, ROWS),
        (batch.attention.suffix_blocks, torch.randperm(15, generator=generator).view(5, 3) + 4),
        (batch.tokens, torch.randint(config.vocab_size, (5,), generator=generator)),
        (batch.positions, [23, 37, 52, 10, 9]),
    )  # fmt: skip
    for table, values in tables:
        table.copy_(torch.as_tensor(values))
    batch.attention.begin_step()
    return batch


def step(model: Any, forward: DecodeForward | None, dtype: torch.dtype | None) -> list[Tensor]:
    """The last hidden states of a step, and the whole cache behind it."""
    batch = batch_of(model, dtype or model.dtype)
    with autocast(model.device, dtype):
        if forward is not None:
            hidden = forward.hidden(batch)
        else:
            positions = batch.positions.expand(batch.position_dims, -1)[..., None]
            hidden = family_of(model).hidden(model, batch.tokens[:, None], positions, [], shared=batch.attention)[:, 0]
    return [hidden, batch.attention.cache.data]


def forward_of(model: Any, dtype: torch.dtype | None = None, **options: Any) -> DecodeForward:
    assert DecodeForward.supports(model, family_of(model), dtype) is None
    return DecodeForward(model, family_of(model), dtype, **options)


LORA = {"weights": "", "adapter": "unmerged", "merged adapter": "merged"}


@pytest.mark.parametrize("lora", LORA.values(), ids=LORA.keys())
@pytest.mark.parametrize("family", mostly_slow([*FAMILIES], "qwen2_5_vl", "glm4v"))
def test_equals_the_stock_step(family: str, lora: str) -> None:
    """On a CPU to the bit; with merged products, as on CUDA, but for rounding."""
    model = model_of(family, lora=lora)
    expected = step(model, None, None)
    assert expected[0].std() > 0.1
    assert all(torch.equal(*each) for each in zip(step(model, forward_of(model), None), expected, strict=True))
    merged = step(model, forward_of(model, merged_gemms=True), None)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
    wide = model.double()
    expected = step(wide, None, None)
    # The stock norm is in float32.
    torch.testing.assert_close(step(wide, forward_of(wide, merged_gemms=True), None), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merged_gemms", [False, True], ids=["as on a CPU", "as on CUDA"])
@pytest.mark.parametrize("family", mostly_slow([*FAMILIES], "qwen2_5_vl", "glm4v"))
def test_error_in_bfloat16(family: str, merged_gemms: bool) -> None:
    """At most twice the stock step's, against float64: with autocast, with an adapter, and with bfloat16 weights."""
    narrow = torch.bfloat16
    for lora, dtype, weights in (("", narrow, torch.float32), ("unmerged", narrow, torch.float32), ("", None, narrow)):
        model = model_of(family, dtype=weights, lora=lora)
        exact = step(model_of(family, dtype=weights, lora=lora).double(), None, None)
        forward = forward_of(model, dtype, merged_gemms=merged_gemms)
        found, plain = (step(model, each, dtype) for each in (forward, None))
        assert [each.dtype for each in found] == [each.dtype for each in plain]
        assert_within_budget(["hidden", "cache"], found, plain, exact)


def counted(model: Any, dtype: torch.dtype | None, **options: Any) -> OpsCounted:
    """Launches of a step as on CUDA: Triton kernels are counted, and not run."""
    ops, batch = OpsCounted(), batch_of(model, dtype or model.dtype)
    forward = forward_of(model, dtype, merged_gemms=True, layers=LigerLayers(), **options)
    implementations = use(rope_kv_write="triton", shared_prefix_decode="triton")
    with implementations, autocast(model.device, dtype), ops, kernels_counted(ops):
        forward.hidden(batch)
    return ops


MERGED = limit_of("launches of a decode layer, Qwen3-VL, merged")  # of every family
LIMITS = {"qwen2_5_vl": limit_of("launches of a decode layer, Qwen2.5-VL"), "glm4v": MERGED + 2}  # with two more norms
MORE = limit_of("more launches for each adapted projection")
ADAPTED = {name: 6 if name == "glm4v" else 7 for name in FAMILIES}  # linear layers of a layer


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["masters", "bfloat16 weights"])
@pytest.mark.parametrize("family", mostly_slow([*FAMILIES], "qwen2_5_vl", "glm4v"))
def test_launches_a_layer_and_casts(family: str, weights: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    monkeypatch.setenv(interpreter.VARIABLE, "1")
    dtype = torch.bfloat16 if weights == torch.float32 else None

    def a_layer(lora: str) -> int:
        ops = [counted(model_of(family, layers=n, dtype=weights, lora=lora), dtype) for n in (1, 2)]
        # Nothing is cast that is larger than the activations of five rows; a weight is.
        assert max(prod(shape) for each in ops for shape in each.casts) <= 5 * HIDDEN
        return ops[1].total - ops[0].total

    plain = a_layer("merged")
    assert plain <= LIMITS.get(family, MERGED)
    if dtype is not None:
        assert a_layer("unmerged") <= plain + MORE * ADAPTED[family]


def test_reads_the_weights_of_each_generation() -> None:
    """Weights in place and copied ones follow updates, and stay where they are until they are released."""
    model = model_of("qwen2_5_vl", lora="unmerged")
    dtypes = (None, torch.bfloat16)
    forwards = [forward_of(model, dtype, merged_gemms=True) for dtype in dtypes]
    before = [step(model, *each) for each in zip(forwards, dtypes, strict=True)]
    for parameter in model.parameters():
        parameter.mul_(1.5)
    for forward, dtype, old in zip(forwards, dtypes, before, strict=True):
        forward.refresh()
        assert forward.fixed_addresses and forward.copies == (dtype is not None)
        found, new = step(model, forward, dtype)[0], step(model, forward_of(model, dtype, merged_gemms=True), dtype)[0]
        assert torch.equal(found, new) and not torch.equal(found, old[0])
        bias = sum(each.nbytes for each in forward.weights.buffers.values() if each.dim() == 1)
        layers = model.model.language_model.layers
        assert forward.copied_bytes - bias == copied_bytes(layers, dtype or torch.float32) > 0
    forwards[1].release()
    assert not forwards[1].weights.buffers
    forwards[1].refresh()
    assert torch.equal(step(model, forwards[1], torch.bfloat16)[0], found)


def test_a_merged_adapter_moves_weights() -> None:
    model = model_of("qwen2_5_vl", lora="unmerged")
    forward = forward_of(model)
    layer = model.model.language_model.layers[0].self_attn.q_proj
    layer.merge(safe_merge=True)
    forward.refresh()
    assert not forward.fixed_addresses
    assert all(torch.equal(*each) for each in zip(step(model, forward, None), step(model, None, None), strict=True))


def _window(model: Any, layer: Any) -> None:
    layer.self_attn.sliding_window = 5


def _hook(model: Any, layer: Any) -> None:
    layer.mlp.register_forward_hook(lambda *_: None)


def _quantized(model: Any, layer: Any) -> None:
    layer.mlp.up_proj = type("Linear4bit", (nn.Linear,), {})(64, 64)


def _more(model: Any, layer: Any) -> None:
    layer.mlp.router = nn.Linear(2, 2)


def _sharded(model: Any, layer: Any) -> None:
    model.lm_head.weight.ds_id = 3


def _activation(model: Any, layer: Any) -> None:
    layer.mlp.act_fn = nn.GELU()


def _dtypes(model: Any, layer: Any) -> None:
    layer.mlp.up_proj.bfloat16()


def _dora(model: Any, layer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(use_dora=True, target_modules=["q_proj"]))


UNSUPPORTED = {
    _window: "sliding_window", _hook: "hooks", _quantized: "Linear4bit", _more: "router", _sharded: "sharded",
    _activation: "GELU", _dtypes: "several dtypes", _dora: "plain LoRA",
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), UNSUPPORTED.items(), ids=UNSUPPORTED.values())
def test_what_the_stock_forward_runs(change: Any, reason: str) -> None:
    model = model_of("qwen2_5_vl")
    change(model, model.model.language_model.layers[-1])
    assert reason in (DecodeForward.supports(model, family_of(model)) or "")


def test_a_liger_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert type(functions_on(torch.device("cuda"))) is LigerLayers
    monkeypatch.delattr("liger_kernel.ops.swiglu.swiglu_forward")
    assert type(functions_on(torch.device("cuda"))) is TorchLayers
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    assert type(functions_on(torch.device("cuda"))) is TorchLayers
    assert caplog.text.count("no liger-kernel") == 2


@one_family()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_a_rollout_with_and_without_it(
    dtype: torch.dtype | None, make: Any, model: Any, processor: Any, caplog: Any
) -> None:
    """On a CPU every log-prob is equal to the bit, and no copy of a weight is left behind."""
    caplog.set_level("INFO", "vlmr1.rollout.native")
    prompts, drawn = [make.prompt("Where is the digit 7?", (56,)), make.prompt("What is seven?", ())], []
    for choice in ("auto", "torch"):
        native = NativeEngine(model, family_of(model), processor.tokenizer, dtype=dtype, fused_layers=choice)
        native.generate(prompts, 1, SamplingSettings(1))
        drawn.append(completions(native.generate(prompts, 3, SamplingSettings(8, seed=3))))
        forward = native.decode_forward
        assert (forward is None) == (choice == "torch")
        assert forward is None or not (forward.layers or forward.weights.buffers)
    assert caplog.text.count("stock forward") == 1  # once in both generations
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one.token_ids, other.token_ids) and torch.equal(one.logp, other.logp)
