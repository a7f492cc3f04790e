"""The native engine against `model.generate`, and its log-probs against the training forward's."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from tests.helpers.rollouts import (
    CASES,
    GREEDY,
    assert_close,
    changed_logits,
    completions,
    engine,
    generated,
    prompts_of,
    tokens,
)
from vlmr1.grpo.naive import NaivePolicy
from vlmr1.grpo.packing import make_pack, plan_packs
from vlmr1.grpo.policy import PackedPolicy
from vlmr1.models import family_of
from vlmr1.rollout import NativeEngine, SamplingSettings, TransformersEngine

KINDS = [NativeEngine, TransformersEngine]


@pytest.mark.parametrize("generations, length", [(1, 20), (3, 20), (3, 1)])
@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_generate(case, generations, length, make, model, processor):
    prompts, settings = prompts_of(make, case), replace(GREEDY, max_completion_length=length)
    groups, fallback = (engine(model, processor, kind).generate(prompts, generations, settings) for kind in KINDS)
    assert tokens(groups) == tokens(fallback)
    for one, other in zip(completions(groups), completions(fallback), strict=True):
        assert_close(one.logp, other.logp)
        assert_close(one.sampling_logp, other.sampling_logp)
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
    for prompt, group in zip(prompts, groups, strict=True):
        assert group.prompt is prompt and len(group.completions) == generations
        ids, logp, _ = generated(model, processor, prompt, length)
        for completion in group.completions:
            assert completion.token_ids.tolist() == ids
            assert_close(completion.logp, logp)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_config_of_the_model_has_no_part_in_a_rollout(kind, make, model, processor):
    """Checkpoints ship penalties and truncations there (Qwen2.5-VL-3B: repetition_penalty 1.05)."""
    prompts = prompts_of(make, "one_image")
    plain = engine(model, processor, kind).generate(prompts, 1, GREEDY)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=2)
    assert tokens(engine(model, processor, kind).generate(prompts, 1, GREEDY)) == tokens(plain)


PASSES = [(NativeEngine, *each) for each in product(("text_beside_images", "mixed_lengths"), (1.0, 0.7))]
PASSES += [(TransformersEngine, "mixed_lengths", 0.7)]


@pytest.mark.parametrize("kind, case, temperature", PASSES)
def test_logp_equals_the_training_forward(kind, case, temperature, make, model, processor):
    """Completions of different lengths: the branches are cut after 20, 13, 6 and 1 tokens."""
    settings = SamplingSettings(20, temperature, seed=3)
    drawn = engine(model, processor, kind).generate(prompts_of(make, case), 4, settings, step=5)
    groups = []
    for group in drawn:
        pairs = zip(group.completions, (20, 13, 6, 1), strict=True)
        short = tuple(replace(c, token_ids=c.token_ids[:n], logp=c.logp[:n]) for c, n in pairs)
        groups.append(replace(group, completions=short, advantages=torch.zeros(4)))
    family = family_of(model)
    for forward, shared in ((PackedPolicy, True), (NaivePolicy, False)):
        policy = forward(model, family, temperature=temperature)
        rows = plan_packs(groups, tokens_per_pack=10**6, share_prompt=shared, pack=shared)
        logp = torch.cat([policy.logprobs(make_pack(row, share_vision=shared)) for row in rows])
        assert_close(logp, torch.cat([completion.logp for completion in completions(groups)]))


@pytest.mark.parametrize(
    "settings", [GREEDY, SamplingSettings(12, seed=1), SamplingSettings(12, 0.7)], ids=["greedy", "1.0", "0.7"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_are_never_sampled(kind, settings, make, model, processor):
    """The head prefers them by far; the two log-probs differ by the mass that is left."""
    banned = family_of(model).placeholder_ids(model)
    seen = []

    def prefer(call: int, logits: Tensor) -> None:
        logits[..., model.generation_config.eos_token_id] = -50  # every row is there to the end
        logits[..., banned] = logits.amax(-1, keepdim=True) + 20
        seen.append(logits.flatten(0, -2).double() / settings.temperature)

    assert len({model.config.image_token_id, model.config.video_token_id, *banned}) == len(banned) == 4
    prompts = prompts_of(make, "mixed_lengths")
    with changed_logits(model, prefer):
        groups = engine(model, processor, kind).generate(prompts, 3, settings)
    assert not {token for ids in tokens(groups) for token in ids} & set(banned)
    seen[0] = seen[0].repeat_interleave(9 // len(seen[0]), 0)  # the native prefill has one row a prompt
    for row, completion in enumerate(completions(groups)):
        logits = torch.stack([each[row] for each in seen[: len(completion.token_ids)]])
        full, chosen = logits.log_softmax(-1), completion.token_ids[:, None]
        allowed = full.index_fill(-1, torch.tensor(banned), float("-inf"))
        logp = full.gather(-1, chosen)[:, 0]
        assert float(logp.max()) < -5
        assert_close(completion.logp.double(), logp)
        expected = logp - allowed.exp().sum(-1).log()
        assert_close(completion.sampling_logp.double(), expected)
        if settings.greedy:
            assert completion.token_ids.tolist() == allowed.argmax(-1).tolist()


def test_completion_does_not_depend_on_its_batch(make, model, processor):
    native, settings = engine(model, processor), SamplingSettings(20, 1.5, seed=2)
    prompts = prompts_of(make, "mixed_lengths")
    together = native.generate(prompts, 4, settings, step=7)
    for prompt, group in zip(prompts, together, strict=True):
        (alone,) = native.generate([prompt], 4, settings, step=7)
        assert tokens([alone]) == tokens([group])
        for one, other in zip(alone.completions, group.completions, strict=True):
            assert_close(one.logp, other.logp)
        (fewer,) = native.generate([prompt], 2, settings, step=7)
        assert tokens([fewer]) == tokens([group])[:2]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_seed_step_prompt_and_branch(kind, make, model, processor):
    drawing, settings = engine(model, processor, kind), SamplingSettings(20, 2.0, seed=2)
    first, second = make.prompt("Locate the digit 7.", (112,)), make.prompt("Locate the digit 7.", (112,))
    drawn = drawing.generate([first, second], 3, settings, step=7)
    assert tokens(drawing.generate([first, second], 3, settings, step=7)) == tokens(drawn)
    others = drawing.generate([first], 3, settings, step=8)
    others += drawing.generate([first], 3, replace(settings, seed=3), step=7)
    assert len({tuple(ids) for ids in tokens([*drawn, *others])}) == 12


def test_stop_token_and_length_limit(make, model, processor):
    """Branch i is made to stop at its token i + 2, when it is the first that is left; the last has no room for it."""
    stops = model.generation_config.eos_token_id

    def stop(call: int, logits: Tensor) -> None:
        logits[:, stops] = -50
        if call:
            logits[0, stops[(call - 1) % 2]] = 80

    with changed_logits(model, stop):
        groups = engine(model, processor).generate([make.prompt("Where?", (56,))], 4, SamplingSettings(4, 1.5))
    assert [len(ids) for ids in tokens(groups)] == [2, 3, 4, 4]
    assert [ids[-1] for ids in tokens(groups)[:3]] == [stops[0], stops[1], stops[0]]
    assert not set(stops) & {token for ids in tokens(groups) for token in ids[:-1] + tokens(groups)[3]}
    assert [c.finish_reason for c in completions(groups)] == ["stop", "stop", "stop", "length"]
    for completion in completions(groups):
        assert len(completion.logp) == len(completion.sampling_logp) == len(completion.token_ids)
        assert completion.text == processor.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert processor.tokenizer.eos_token not in completion.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_text_ends_a_completion(kind, make, model, processor):
    """With the token that completes it, wherever its tokens are cut."""
    (prompt,) = prompts_of(make, "one_image")
    (plain,) = engine(model, processor, kind).generate([prompt], 1, GREEDY)
    text = processor.tokenizer.decode(plain.completions[0].token_ids)
    stop = text[5:9]
    (group,) = engine(model, processor, kind).generate([prompt], 2, replace(GREEDY, stop=("never there", stop)))
    for completion in group.completions:
        ids = plain.completions[0].token_ids.tolist()
        length = next(n for n in range(1, len(ids) + 1) if stop in processor.tokenizer.decode(ids[:n]))
        assert completion.token_ids.tolist() == ids[:length] and length < len(ids)
        assert completion.finish_reason == "stop" and stop in completion.text


@pytest.mark.parametrize("kind", KINDS)
def test_repetition_penalty_is_that_of_generate(kind, make, model, processor):
    """Over prompt and completion; `logp` is of the distribution without it."""
    settings = replace(GREEDY, repetition_penalty=1.8)
    prompts = prompts_of(make, "mixed_lengths")
    groups = engine(model, processor, kind).generate(prompts, 2, settings)
    plain = engine(model, processor, kind).generate(prompts, 2, GREEDY)
    assert tokens(groups) != tokens(plain)
    for prompt, group in zip(prompts, groups, strict=True):
        ids, logp, sampling_logp = generated(model, processor, prompt, 20, repetition_penalty=1.8)
        for completion in group.completions:
            assert completion.token_ids.tolist() == ids
            assert_close(completion.logp, logp)
            assert_close(completion.sampling_logp, sampling_logp)


def test_stats_count_what_was_drawn(make, model, processor):
    native = engine(model, processor)
    groups = native.generate(prompts_of(make, "mixed_lengths"), 2, SamplingSettings(5))
    values = native.stats.values()
    assert native.stats.tokens == sum(len(ids) for ids in tokens(groups))
    assert values["rollout/tokens_per_second"] == native.stats.tokens / native.stats.seconds
    parts = values["rollout/prefill_seconds"], values["rollout/decode_seconds"]
    assert min(parts) > 0 and sum(parts) < native.stats.seconds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_engine_leaves_the_model_as_it_was(kind, training, make, model, processor):
    model.train(training)
    attention = model.model.language_model.config._attn_implementation
    random = torch.get_rng_state()
    drawn = engine(model, processor, kind).generate([make.prompt("Where?", (56,))], 2, SamplingSettings(3))
    assert all(module.training is training for module in model.modules())
    assert model.model.language_model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(c.logp.requires_grad for c in completions(drawn))
