"""The pool of keys and values, its budget, and steps on fixed tensors: none of them changes what is drawn."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.rollouts import (
    GREEDY,
    assert_close,
    changed_logits,
    completions,
    engine,
    prompts_of,
    tokens,
    with_stub_graphs,
)
from vlmr1.errors import SettingError
from vlmr1.models import family_of
from vlmr1.rollout import NativeEngine, SamplingSettings, graphs, scheduler
from vlmr1.rollout import native as native_module
from vlmr1.types import Group


def block_mib(model: Any) -> float:
    """For 16 tokens of keys and values, in float32."""
    text = model.config.text_config
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    return 16 * 4 * 2 * text.num_hidden_layers * width / 2**20


@pytest.mark.parametrize("generations", [1, 5])
def test_prefix_is_stored_once_a_group(generations, make, model, processor, monkeypatch):
    """Bytes of the KV cache: a prompt's blocks once, whatever the generations; a block of 16 tokens a branch."""
    pools = []

    class Recorded(native_module.KVCache):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            pools.append(self)

    monkeypatch.setattr(native_module, "KVCache", Recorded)
    prompts = prompts_of(make, "mixed_lengths")
    native = engine(model, processor)
    native.generate(prompts, generations, SamplingSettings(6))
    (pool,) = pools
    count = sum(-(-len(prompt.input_ids) // 16) for prompt in prompts) + 3 * generations
    assert pool.data.untyped_storage().nbytes() == pytest.approx((count + 1) * block_mib(model) * 2**20)
    assert native.stats.kv_peak_mib == pytest.approx(count * block_mib(model))
    assert pool.allocator.num_free == count  # all free again


def limited(model: Any, processor: Any, blocks: float) -> Any:
    native = engine(model, processor)
    native.kv_mib = blocks * block_mib(model)
    return native


def assert_same(groups: list[Group], others: list[Group]) -> None:
    assert tokens(groups) == tokens(others)
    for one, other in zip(completions(groups), completions(others), strict=True):
        assert one.finish_reason == other.finish_reason
        assert_close(one.logp, other.logp)
        assert_close(one.sampling_logp, other.sampling_logp)


@pytest.mark.parametrize("blocks", [17, 22, 40], ids=["one group", "crowded", "two groups"])
def test_a_small_budget_changes_nothing_but_the_order(blocks, make, model, processor):
    """Prompts of 2 to 5 blocks, completions of up to 3: groups wait, take the place of others, or go back."""
    settings = SamplingSettings(40, 2.0, seed=5)
    prompts = prompts_of(make, "mixed_lengths", "text_beside_images")
    free, tight = engine(model, processor), limited(model, processor, blocks)
    expected = free.generate(prompts, 4, settings, step=3)
    assert_same(tight.generate(prompts, 4, settings, step=3), expected)
    assert tight.stats.kv_peak_mib <= blocks * block_mib(model) < free.stats.kv_peak_mib
    assert free.stats.preemptions == 0


def test_a_preempted_group_goes_on_where_it_was(make, model, processor):
    """Short completions come first, so that more groups are let in than long ones leave room for."""
    stops, settings = model.generation_config.eos_token_id, SamplingSettings(64, seed=5)
    prompts = [make.prompt("What is seven?") for _ in range(6)]

    def short_then_long(call: int, logits: Tensor) -> None:
        logits[:, stops] = 80 if call == 1 else -80  # the second token of the first group's

    def long(call: int, logits: Tensor) -> None:
        logits[:, stops] = -80

    tight = limited(model, processor, -(-len(prompts[0].input_ids) // 16) + 2 * 4 + 3)
    decoded = []
    with changed_logits(model, short_then_long), changed_logits(model, lambda _, logits: decoded.append(len(logits))):
        groups = tight.generate(prompts, 2, settings)
    with changed_logits(model, long):
        expected = engine(model, processor).generate(prompts, 2, settings)
    assert tight.stats.preemptions > 0
    assert sum(decoded) == tight.stats.tokens - 6  # no token twice; the first of a group's two come from one row
    assert [len(ids) for ids in tokens(groups)] == [2, 2] + [64] * 10
    assert_same(groups[1:], expected[1:])


@pytest.mark.parametrize("at", [0, 15], ids=["prefill", "decode"])
def test_out_of_memory_halves_the_budget_and_loses_nothing(at, make, model, processor, caplog, monkeypatch):
    settings, prompts = SamplingSettings(20, 1.5, seed=5), prompts_of(make, "mixed_lengths")
    stops = model.generation_config.eos_token_id
    kept, failed = [], []

    class Seen(scheduler.Scheduler):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            kept.append(len(self.done))

    def sooner(call: int, logits: Tensor) -> None:
        logits[:, stops] += 3.0  # so that some have ended when it happens

    def fail(call: int, logits: Tensor) -> None:
        sooner(call, logits)
        if call == at and not failed:
            failed.append(call)
            raise torch.OutOfMemoryError("out of memory")

    with changed_logits(model, sooner):
        expected = engine(model, processor).generate(prompts, 3, settings)
    monkeypatch.setattr(native_module, "Scheduler", Seen)
    native = limited(model, processor, 100)
    with changed_logits(model, fail):
        groups = native.generate(prompts, 3, settings)
    assert failed == [at] and native.stats.out_of_memory == 1 and native.max_blocks is not None
    assert kept[0] == 0 and (0 < kept[1] < 9) == (at > 0)
    assert "half the KV cache" in caplog.text
    assert_same(groups, expected)
    native.generate(prompts, 3, settings)
    assert native.stats.out_of_memory == 0  # the next rollout begins with what was left


def test_a_cache_that_cannot_be_allocated_is_halved_too(make, model, processor, monkeypatch):
    settings, prompts = SamplingSettings(20, 1.5, seed=5), prompts_of(make, "mixed_lengths")
    expected = engine(model, processor).generate(prompts, 3, settings)
    asked = []

    class Scarce(native_module.KVCache):
        def __init__(self, config: Any, blocks: int, **options: Any):
            asked.append(blocks)
            if len(asked) == 1:
                raise torch.OutOfMemoryError("out of memory")
            super().__init__(config, blocks, **options)

    monkeypatch.setattr(native_module, "KVCache", Scarce)
    assert_same(engine(model, processor).generate(prompts, 3, settings), expected)
    assert asked[1] == asked[0] // 2


def test_a_group_that_never_fits_is_refused(make, model, processor):
    native = limited(model, processor, 40)

    def fail(call: int, logits: Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with changed_logits(model, fail), pytest.raises(SettingError, match="rollout_kv_mib"):
        native.generate(prompts_of(make, "one_image"), 8, SamplingSettings(40))
    assert model.training is False


@pytest.mark.parametrize("blocks", [None, 22], ids=["all at once", "crowded"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_padded_batches_and_rare_looks_change_nothing(blocks, penalty, make, model, processor, monkeypatch):
    """As with CUDA graphs: fixed tensors of some sizes, and sixteen steps between two looks."""
    settings = SamplingSettings(40, 2.0, seed=5, repetition_penalty=penalty)
    prompts = prompts_of(make, "mixed_lengths", "text_beside_images")
    expected = engine(model, processor).generate(prompts, 4, settings, step=3)
    captured = with_stub_graphs(monkeypatch)
    native = engine(model, processor) if blocks is None else limited(model, processor, blocks)
    assert_same(native.generate(prompts, 4, settings, step=3), expected)
    assert [each.rows for each in captured] == ([24] if blocks is None else [4, 8])


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (5, 8), (24, 24), (25, 32), (512, 512), (513, 640)])
def test_ladder(rows, size):
    assert graphs.capture_size(rows) == size


def test_graphs_are_refused_where_they_cannot_be(make, model, processor):
    native = NativeEngine(model, family_of(model), processor.tokenizer, cuda_graphs=True)
    with pytest.raises(SettingError, match=r"cuda_graphs: shared_prefix_decode .*reference"):
        native.generate(prompts_of(make, "one_image"), 2, GREEDY)
    model.config.text_config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(SettingError, match=r"cuda_graphs: .* dynamic"):
        native.generate(prompts_of(make, "one_image"), 2, GREEDY)


DRAWN = {
    "greedy": replace(GREEDY, max_completion_length=40),
    "sampled": SamplingSettings(40, 1.5, seed=5),
    "truncated": SamplingSettings(40, 1.5, seed=5, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", DRAWN.values(), ids=DRAWN.keys())
def test_graphs_draw_what_single_launches_draw(settings, make, model, processor):
    """In float32, so that rounding decides nothing; groups come and go."""
    model.to("cuda")
    prompts = prompts_of(make, "mixed_lengths", "text_beside_images")
    found = {}
    for on in (False, True):
        native = NativeEngine(model, family_of(model), processor.tokenizer, kv_mib=2.0, cuda_graphs=on)
        found[on] = native.generate(prompts, 4, settings)
    assert_same(found[True], found[False])
