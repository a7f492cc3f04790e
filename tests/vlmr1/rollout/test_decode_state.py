"""KV cache and CUDA graphs that are kept between generations: when they are captured, dropped, and what they return."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from tests.helpers.decoding import StubScheduler, length_draws, state_of
from tests.helpers.limits import limit_of
from tests.helpers.rollouts import changed_logits, completions, engine, with_stub_graphs
from tests.helpers.slow import mostly_slow
from vlmr1.errors import SettingError
from vlmr1.rollout import NativeEngine, SamplingSettings, decode_state, scheduler
from vlmr1.rollout.decoder import DecodeForward
from vlmr1.rollout.kv_cache import num_blocks, rounded_up
from vlmr1.rollout.settings import COPIES_SHARE, KEPT_SHARE
from vlmr1.types import Group

GIB = 2**30


def assert_equal(groups: list[Group], others: list[Group]) -> None:
    for one, other in zip(completions(groups), completions(others), strict=True):
        assert one.finish_reason == other.finish_reason
        for name in ("token_ids", "logp", "sampling_logp"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


# dtype of autocast, whether weights are trained, layers -> captures of three generations
KEPT = {
    "float32": (None, True, "torch", [1, 0, 0]),
    "frozen weights under autocast": (torch.bfloat16, False, "torch", [1, 0, 0]),
    "autocast's copies of trained weights": (torch.bfloat16, True, "torch", [1, 1, 1]),
    "copies at fixed addresses": (torch.bfloat16, True, "auto", [1, 0, 0]),
}


@pytest.mark.parametrize("dtype, trained, layers, captures", mostly_slow(KEPT, "copies at fixed addresses"))
def test_kept_graphs_draw_what_new_ones_draw(dtype, trained, layers, captures, make, model, processor, monkeypatch):
    """Bit for bit, over generations with updates in between, with other prompts each time."""
    model.requires_grad_(trained)
    captured = with_stub_graphs(monkeypatch)
    kept, anew = engine(model, processor), engine(model, processor)
    kept.keep_cache, anew.keep_cache = True, False
    kept.dtype = anew.dtype = dtype
    kept.fused_layers = anew.fused_layers = layers
    counts = []
    for step in range(3):
        prompts = [make.prompt(f"What is {'seven ' * step}?") for _ in range(3)]
        settings = SamplingSettings(24, 1.5, seed=step)
        expected = anew.generate(prompts, 4, settings, step=step)
        captured.clear()
        assert_equal(kept.generate(prompts, 4, settings, step=step), expected)
        counts.append(len(captured))
        assert kept.stats.captures == len(captured) and anew.state is None
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 0.05 * (step + 1))
    assert counts == captures


def moved(native: Any) -> None:
    weight = native.model.lm_head.weight
    weight.data = weight.data.clone()


def narrowed(native: Any) -> None:
    native.dtype, native.decode_forward = torch.bfloat16, None


def recopied(native: Any) -> None:
    native.held = dict(native.decode_forward.weights.buffers)  # new copies cannot be at their addresses
    native.decode_forward.weights.buffers.clear()


# What changes in the second generation: prompts, words more in each, G, sampling, the engine -> captures
BEFORE = {"prompts": 2, "words": 0, "count": 4, "sampling": SamplingSettings(20), "change": None, "dtype": None}
SECOND: dict[str, tuple[dict[str, Any], int]] = {
    "nothing": ({}, 0),
    "seed": ({"sampling": SamplingSettings(20, seed=1)}, 0),
    "stop texts": ({"sampling": SamplingSettings(20, stop=("a",))}, 0),
    "shorter completions": ({"sampling": SamplingSettings(3)}, 0),
    "longer completions": ({"sampling": SamplingSettings(40)}, 1),
    "fewer generations": ({"count": 2}, 0),
    "more generations": ({"count": 5}, 1),
    "fewer prompts": ({"prompts": 1}, 0),
    "more prompts": ({"prompts": 3}, 1),
    "longer prompts": ({"words": 1}, 0),
    "much longer prompts": ({"words": 40}, 1),
    "temperature": ({"sampling": SamplingSettings(20, 0.5)}, 1),
    "greedy": ({"sampling": SamplingSettings(20, greedy=True)}, 1),
    "truncation": ({"sampling": SamplingSettings(20, top_k=5)}, 1),
    "penalty": ({"sampling": SamplingSettings(20, repetition_penalty=1.2)}, 1),
    "dtype": ({"change": narrowed}, 1),
    "addresses of weights": ({"change": moved}, 1),
    "addresses of copies": ({"change": recopied, "dtype": torch.bfloat16}, 1),
    "freed": ({"change": NativeEngine.free_cache}, 1),
}


@pytest.mark.parametrize("second, captures", SECOND.values(), ids=SECOND.keys())
def test_what_a_graph_has_baked_in_invalidates_it(second, captures, make, model, processor, monkeypatch):
    captured = with_stub_graphs(monkeypatch)
    model.requires_grad_(False)
    native = engine(model, processor)
    native.keep_cache, native.dtype = True, second.get("dtype")
    for settings in (BEFORE, BEFORE | second):
        captured.clear()
        if settings["change"]:
            settings["change"](native)
        prompts = [make.prompt("What is " + "seven " * settings["words"]) for _ in range(settings["prompts"])]
        native.generate(prompts, settings["count"], settings["sampling"])
    assert len(captured) == captures


def test_two_sampling_settings_keep_their_graphs(make, model, processor, monkeypatch):
    """As in an evaluation that decodes greedily and draws; a third one takes the place of the oldest."""
    captured = with_stub_graphs(monkeypatch)
    native = engine(model, processor)
    native.keep_cache = True
    prompts, first = [make.prompt("Where?")], SamplingSettings(4)
    for _ in range(2):
        for sampling, count in ((first, 3), (replace(first, greedy=True), 1)):
            native.generate(prompts, count, sampling)
    assert len(captured) == 2
    native.generate(prompts, 3, replace(first, temperature=2.0))
    assert native.state is not None and len(native.state.graphs) == 2 and len(captured) == 3
    native.generate(prompts, 1, replace(first, greedy=True))
    assert len(captured) == 3


def test_out_of_memory_drops_what_is_kept(make, model, processor, monkeypatch, caplog):
    """The generation goes on with half the cache and a new graph, which the next one uses."""
    captured = with_stub_graphs(monkeypatch)
    kept, fresh = engine(model, processor), engine(model, processor)
    kept.keep_cache = True
    prompts, settings = [make.prompt("Where?") for _ in range(4)], SamplingSettings(20)
    kept.generate(prompts, 4, settings)
    blocks, at = kept.state.cache.allocator.count, iter(range(100))

    def fail(call: int, logits: Any) -> None:
        if next(at) == 7:
            raise torch.OutOfMemoryError("out of memory")

    captured.clear()
    with changed_logits(model, fail):
        kept.generate(prompts, 4, settings)
    assert kept.stats.out_of_memory == 1 and "half the KV cache" in caplog.text
    assert kept.state.cache.allocator.count <= blocks // 2 and len(captured) == 1
    captured.clear()
    groups = kept.generate(prompts, 4, settings, step=1)
    assert not captured
    assert [each.token_ids.tolist() for each in completions(groups)] == [
        each.token_ids.tolist() for each in completions(fresh.generate(prompts, 4, settings, step=1))
    ]


def interrupted(native: Any, prompts: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scheduler.Scheduler, "decode", Mock(side_effect=KeyboardInterrupt))
        native.generate(prompts, 2, SamplingSettings(4))


@pytest.mark.parametrize("lose", [lambda native, _: native.free_cache(), interrupted], ids=["freed", "interrupted"])
def test_graphs_are_kept_again(lose, make, model, processor, monkeypatch):
    """By default, after copies of weights have been freed, as before an evaluation, and made anew elsewhere."""
    captured, counts, prompts = with_stub_graphs(monkeypatch), [], [make.prompt("Where?")]
    monkeypatch.setattr(NativeEngine, "_device_bytes", 80 * GIB)
    native = engine(model, processor)
    native.dtype = torch.bfloat16
    for step in range(4):
        if step == 2:
            held = dict(native.decode_forward.weights.buffers)  # new copies cannot be at their addresses
            lose(native, prompts)
            assert held and native.state is None and not native.decode_forward.weights.buffers
        captured.clear()
        native.generate(prompts, 2, SamplingSettings(4))
        counts.append(len(captured))
    assert counts == [1, 0, 1, 0] and native.state is not None


@pytest.mark.parametrize("times, stock", [(1, False), (2, True)], ids=["once", "twice"])
def test_no_memory_for_copies(times, stock, make, model, processor, monkeypatch, caplog):
    """The kept cache is freed for them; where that is not enough, the stock forward runs, in later generations too."""
    captured, counts, tried, prompts = with_stub_graphs(monkeypatch), [], [], [make.prompt("Where?")]
    native, fresh = engine(model, processor), engine(model, processor)
    native.keep_cache, refresh = True, DecodeForward.refresh

    def short(forward: DecodeForward) -> None:
        tried.append(native.state is not None)
        if len(tried) <= times:
            raise torch.OutOfMemoryError("out of memory")
        refresh(forward)

    for step in range(3):
        if step == 1:
            monkeypatch.setattr(DecodeForward, "refresh", short)
        captured.clear()
        groups = native.generate(prompts, 2, SamplingSettings(4), step=step)
        counts.append(len(captured))
    assert (native.decode_forward is None) == stock
    assert counts == [1, 1, 0]
    assert tried == [True, False] + [True] * (not stock)
    assert caplog.text.count("no memory for copies") == stock
    assert_equal(groups, fresh.generate(prompts, 2, SamplingSettings(4), step=2))


# Distribution of lengths, limit, prompts, size of the KV cache in groups of the longest -> captures of 6 generations
LENGTHS = {
    "short": ("lognormal", 256, 8, 8.0, [3, 0, 0, 0, 0, 0]),
    "long": ("lognormal", 2048, 8, 8.0, [4, 0, 0, 0, 0, 0]),
    "stragglers": ("bimodal", 2048, 8, 8.0, [1, 1, 0, 0, 0, 0]),
    "groups wait": ("lognormal", 1024, 32, 4.0, [4, 2, 0, 0, 0, 0]),
    "all at the limit": ("limit", 256, 8, 8.0, [1, 0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize("kind, limit, prompts, share, captures", LENGTHS.values(), ids=LENGTHS.keys())
def test_captures_of_a_generation(kind, limit, prompts, share, captures, monkeypatch):
    """At most two after the first generation, and none in the end."""
    monkeypatch.setattr(scheduler, "STEPS_PER_CHECK", {"cpu": 16})
    monkeypatch.setattr(decode_state, "new_pool", lambda: None)
    group = num_blocks(1200) + 8 * num_blocks(limit - 1)
    state, counts = state_of(int(share * group)), []
    for seed in range(6):
        state.begin_generation(())
        tokens = np.random.default_rng(seed).integers(1100, 1200, prompts)
        schedule = StubScheduler(length_draws(kind, (prompts, 8), limit, seed), limit, tokens, state, graphs=True)
        schedule.run()
        counts.append(schedule.engine.stats.captures)
    assert counts == captures
    assert max(counts[1:]) <= limit_of("captures of CUDA graphs in a generation after the first")
    assert counts[-1] <= limit_of("captures of CUDA graphs in a steady state")


class Redecoded(StubScheduler):
    """Decodes a preempted group again from its first token."""

    def preempt(self) -> None:
        group = self.running[-1].group
        for sequence in [each for each in self.running if each.group is group]:
            self.running.remove(sequence)
            self.free_blocks(sequence)
        self.waiting.appendleft(group.index)
        self.batch = None


# Distribution, limit, prompts, size of the KV cache in groups -> steps and wasted share, of `Redecoded` and of ours.
# A step takes about as long whatever its rows are, so that their number is what a rollout costs.
LONG = {
    "lognormal": ("lognormal", 2048, 32, 4.0, (2783, 0.073), (2639, 0.016)),
    "two kinds": ("bimodal", 2048, 32, 4.0, (6205, 0.325), (4030, 0.009)),
    "thinking": ("bimodal", 8192, 16, 2.5, (16558, 0.190), (11550, 0.002)),
}


@pytest.mark.parametrize("kind, limit, prompts, share, before, after", LONG.values(), ids=LONG.keys())
def test_what_preemption_wastes(kind, limit, prompts, share, before, after, monkeypatch):
    """8 completions of a prompt, of very different lengths; what remains is decoded after the end, until a check."""
    monkeypatch.setattr(scheduler, "STEPS_PER_CHECK", {"cpu": 16})
    group = num_blocks(1200) + 8 * num_blocks(limit - 1)
    lengths = length_draws(kind, (prompts, 8), limit, 0)
    for schedule, expected in ((Redecoded, before), (StubScheduler, after)):
        run = schedule(lengths, limit, 1200, state_of(int(share * group)))
        run.run()
        steps, wasted, _ = run.figures()
        assert (steps, round(wasted / int(lengths.sum()), 3)) == expected
        assert {key: len(each.tokens) for key, each in run.done.items()} == dict(np.ndenumerate(lengths))
        assert run.cache.allocator.num_free == run.cache.allocator.count


def test_blocks_survive_host_memory():
    cache = state_of(9).cache
    cache.data.copy_(torch.randn(cache.data.shape))
    stored = cache.read_blocks([7, 2, 5])
    cache.write_blocks([0, 1, 8], stored)
    rows = cache.data.unflatten(3, (-1, 16))
    assert torch.equal(rows[:, :, :, [0, 1, 8]], rows[:, :, :, [7, 2, 5]])


@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 1000, 1024, 5000])
def test_a_kept_cache_has_room_for_a_bit_more(blocks):
    assert blocks <= rounded_up(blocks) <= 1.125 * blocks and rounded_up(rounded_up(blocks)) == rounded_up(blocks)


KEEPS = {  # setting, bytes of the cache, of the device, graphs, addresses fixed -> kept
    "small": ((None, GIB, 80 * GIB, None, True), True),
    "5%": ((None, KEPT_SHARE * 80 * GIB, 80 * GIB, None, True), True),
    "larger": ((None, KEPT_SHARE * 80 * GIB + 1, 80 * GIB, None, True), False),
    "copied weights, 10%": ((None, 1, 80 * GIB, None, True, COPIES_SHARE * 80 * GIB), True),
    "more copied weights": ((None, 1, 80 * GIB, None, True, COPIES_SHARE * 80 * GIB + 1), False),
    "no GPU": ((None, 1, None, None, True), False),
    "no graphs": ((None, 1, 80 * GIB, False, True), False),
    "weights move": ((None, 1, 80 * GIB, None, False), False),
    "asked for": ((True, 70 * GIB, 80 * GIB, None, True), True),
    "refused": ((False, 1, 80 * GIB, None, True), False),
}


@pytest.mark.parametrize("given, kept", KEEPS.values(), ids=KEEPS.keys())
def test_when_a_cache_is_kept(given, kept):
    setting, cache, device, graphs, fixed, copied = (*given, 0)[:6]
    native: Any = NativeEngine(SimpleNamespace(), None, None, keep_cache=setting, cuda_graphs=graphs)  # type: ignore[arg-type]
    native.decode_forward = SimpleNamespace(fixed_addresses=fixed, copied_bytes=copied)
    assert native.keeps(cache, device) is kept


@pytest.mark.parametrize(
    "settings", [{"lora_merge_rollout": True, "use_peft": True}, {"rollout_engine": "transformers"}]
)
def test_a_cache_that_cannot_be_kept_is_refused(settings):
    from vlmr1.config import GRPOConfig

    with pytest.raises(SettingError, match="rollout_keep_cache"):
        GRPOConfig(use_cpu=True, rollout_keep_cache=True, **settings)
