"""Random numbers against SplitMix64 in Python's own integers, and tokens against the softmax they are drawn from."""

import math

import numpy as np
import pytest
import torch

from vlmr1.rollout import sampling
from vlmr1.rollout.sampling import SamplingSettings, hash_keys, uniform

ONCE = SamplingSettings(1)
GREEDY = SamplingSettings(1, greedy=True)
NONE = torch.tensor([], dtype=torch.int64)
LAST = 1 - 2.0**-53  # the greatest draw there is


def sample_tokens(logits, banned, settings, draws, seen=None):
    return sampling.sample_tokens(logits, banned, settings, torch.from_numpy(draws), seen)


def chain(*keys: int) -> int:
    """Equal hash without numpy: SplitMix64's finalizer over (state xor key) + the golden gamma."""
    word = 2**64
    state = 0
    for key in keys:
        z = ((state ^ (key % word)) + 0x9E3779B97F4A7C15) % word
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % word
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % word
        state = z ^ (z >> 31)
    return state


KEYS = {
    "zero": ((0,), 0xE220A8397B1DCDAF),  # the first output of SplitMix64 seeded with 0, as published
    "one": ((1,), 0x910A2DEC89025CC1),
    "negative": ((-1,), 0xE4D971771B652C20),
    "64-bit": ((2**63 + 5, 2**40), 0x40ECB1EECFEDA91F),
    "rollout": ((0, 0, 0, 0, 0), 0x78AE5A9A6B5FD45E),
    "rollout-later": ((42, 399, 3999, 7, 255), 0x75567E0CEB822D7D),
}


@pytest.mark.parametrize("keys, expected", KEYS.values(), ids=KEYS.keys())
def test_mix(keys, expected):
    assert chain(*keys) == expected
    assert int(hash_keys(*keys)) == expected
    assert float(uniform(*keys)) == (expected >> 11) / 2**53


def test_mix_broadcasts_as_each_key_alone():
    prompts, branches = np.repeat([3, 900], 3), np.tile(np.arange(3), 2)
    expected = [chain(7, 2, int(p), int(b), 11) for p, b in zip(prompts, branches, strict=True)]
    assert hash_keys(7, 2, prompts, branches, 11).tolist() == expected
    assert len(set(expected)) == 6
    assert chain(1, 2) != chain(2, 1)


@pytest.mark.parametrize("place", range(5), ids=["seed", "step", "prompt", "branch", "position"])
def test_uniform_moments_along_each_key(place):
    """Uniform on [0, 1): mean 1/2, variance 1/12, no correlation of neighbours; bounds of four standard errors."""
    count = 100_000
    keys: list = [5, 17, 123, 2, 40]
    keys[place] = np.arange(count)
    draws = uniform(*keys)
    assert 0 <= draws.min() < 1e-4 and 1 - 1e-4 < draws.max() < 1
    assert abs(draws.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / count)
    assert abs(draws.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / count)
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 4 / math.sqrt(count)


def shares(logits: torch.Tensor, draws: np.ndarray, banned: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """[V]: how often each token is chosen."""
    tokens = sample_tokens(logits.expand(len(draws), -1), banned, settings, draws)[0]
    return torch.bincount(tokens, minlength=len(logits)).double() / len(draws)


BANNED = {"none": NONE, "first": torch.tensor([0]), "last": torch.tensor([10]), "runs": torch.tensor([0, 1, 5, 6, 10])}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("banned", BANNED.values(), ids=BANNED.keys())
def test_choose_follows_the_softmax(banned, temperature):
    """Evenly spaced draws meet every probability to one draw (the inverse CDF); hashed ones pass a chi-square test."""
    logits = 2 * torch.randn(11, generator=torch.Generator().manual_seed(1))
    settings = SamplingSettings(1, temperature)
    expected = logits.double().div(temperature).index_fill(0, banned, -math.inf).softmax(0)
    count = 10_000
    even = (np.arange(count) + 0.5) / count
    assert shares(logits, even, banned, settings).sub(expected).abs().max() <= 1.01 / count
    seen = shares(logits, uniform(0, 1, np.arange(count), 3), banned, settings)
    assert bool((seen[banned] == 0).all())
    chi_square = count * ((seen - expected) ** 2 / expected)[expected > 0]
    assert float(chi_square.sum()) < 35.6  # 99.99% at 10 degrees of freedom


def test_choose_at_the_ends_of_the_unit_interval():
    logits = torch.zeros(2, 6)
    tokens, *_ = sample_tokens(logits, torch.tensor([0, 5]), ONCE, np.array([0.0, LAST]))
    assert tokens.tolist() == [1, 4]


def test_greedy_takes_the_best_allowed_token_whatever_the_draw():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]]).repeat(3, 1)
    draws = np.array([0.0, 0.5, LAST])
    assert sample_tokens(logits, NONE, GREEDY, draws)[0].tolist() == [1, 1, 1]
    tokens, logp, sampling_logp = sample_tokens(logits, torch.tensor([1]), GREEDY, draws)
    assert tokens.tolist() == [2, 2, 2]
    assert logp.tolist() == pytest.approx([float(logits[0].log_softmax(0)[2])] * 3, abs=1e-6)
    assert sampling_logp.tolist() == pytest.approx([float(logits[0, [0, 2, 3]].log_softmax(0)[1])] * 3, abs=1e-6)


@pytest.mark.parametrize("lead", [20.0, 1000.0])
@pytest.mark.parametrize("settings", [ONCE, GREEDY], ids=["sampled", "greedy"])
def test_banned_tokens_that_have_all_the_mass_are_never_chosen(settings, lead):
    """The allowed tokens keep their shares of what is left, however little that is."""
    logits = torch.tensor([0.0, lead, math.log(3.0), lead]).expand(4, -1)
    draws = np.array([0.0, 0.2, 0.3, LAST])
    tokens, _, sampling_logp = sample_tokens(logits, torch.tensor([1, 3]), settings, draws)
    expected = [2, 2, 2, 2] if settings.greedy else [0, 0, 2, 2]
    assert tokens.tolist() == expected
    share = {0: math.log(0.25), 2: math.log(0.75)}
    assert sampling_logp.tolist() == pytest.approx([share[token] for token in expected], abs=1e-3)


TRUNCATIONS = {
    "top_k": {"top_k": 3},
    "top_k above the vocabulary": {"top_k": 100},
    "top_p": {"top_p": 0.7},
    "top_p of the first alone": {"top_p": 1e-4},
    "min_p": {"min_p": 0.2},
    "penalty": {"repetition_penalty": 1.7},
    "all": {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3, "temperature": 0.8},
}


@pytest.mark.parametrize("values", TRUNCATIONS.values(), ids=TRUNCATIONS.keys())
def test_truncations_are_those_of_generate(values):
    """What may be drawn, and with which probability, against the library's own processors, in its order."""
    from transformers.generation import logits_process as library

    settings = SamplingSettings(1, **values)
    logits = 2 * torch.randn(5, 13, generator=torch.Generator().manual_seed(4))
    banned, context = torch.tensor([2, 12]), torch.tensor([[0, 3, 3, 7, 1]]).expand(5, -1)
    seen = torch.zeros(5, 13, dtype=torch.bool).scatter_(1, context, True)
    steps = [
        library.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty),
        library.SuppressTokensLogitsProcessor(banned.tolist()),
        library.TemperatureLogitsWarper(settings.temperature),
    ]
    steps += [library.TopKLogitsWarper(settings.top_k)] if settings.top_k else []
    steps += [library.TopPLogitsWarper(settings.top_p)] if settings.top_p < 1 else []
    steps += [library.MinPLogitsWarper(settings.min_p)] if settings.min_p else []
    scores = logits
    for process in steps:
        scores = process(context, scores)
    expected = scores.double().softmax(-1)  # [5, 13]
    count = 4_000
    draws = (np.arange(count) + 0.5) / count
    full = (logits / settings.temperature).log_softmax(-1)
    for row in range(5):
        repeated = logits[row].expand(count, -1), banned, settings, draws, seen[row].expand(count, -1)
        tokens, logp, sampling_logp = sample_tokens(*repeated)
        seen_shares = torch.bincount(tokens, minlength=13).double() / count
        assert seen_shares.sub(expected[row]).abs().max() <= 1.01 / count
        torch.testing.assert_close(sampling_logp, expected[row].log().float()[tokens], rtol=0, atol=1e-5)
        torch.testing.assert_close(logp, full[row][tokens], rtol=0, atol=1e-6)
