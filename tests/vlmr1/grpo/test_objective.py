"""The whole step against each objective written out in float64, and what enters rewards and weights."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.handmade import group, prompt
from tests.helpers.maker import Maker
from tests.helpers.steps import near_the_policy
from tests.helpers.trainers import relative, trainer_of
from tests.helpers.updates import backward, generate, gradients_of
from vlmr1.distributed.ranks import ALONE
from vlmr1.errors import SettingError
from vlmr1.grpo.advantages import with_advantages
from vlmr1.grpo.buffer import ROLLOUTS, Buffer
from vlmr1.grpo.importance_sampling import set_importance_denominators
from vlmr1.grpo.kl_penalty import with_kl
from vlmr1.grpo.naive import NaivePolicy
from vlmr1.grpo.pack_runner import PackRunner
from vlmr1.grpo.packing import make_pack, plan_packs
from vlmr1.types import Group, Pack

CAP = 1.2
EPSILON = 0.2


def groups_of(make: Maker, model: Any) -> list[Group]:
    groups = make.groups(("Locate the digit 9.", (56,), (3, 7, 2)), ("What is seven?", (), (6, 5, 1)))
    return near_the_policy(make, model, groups, noise=0.5)


def clipped(ratio: Tensor, advantage: Tensor, cap: float = math.inf) -> Tensor:
    return -torch.minimum(ratio.clamp(max=cap) * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)


# Losses of a sequence's tokens [C], of their log-probs, entropies and engine's log-probs, and of its advantage


def corrected(mode: str, logp: Tensor, entropy: Tensor, engine: Tensor, advantage: Tensor) -> Tensor:
    """Recomputed old log-probs: the ratio is 1, and the weight is of policy over engine."""
    old = logp.detach()
    difference = old - engine
    ratio = (difference.sum().expand(len(old)) if mode.startswith("sequence") else difference).exp()
    weight = ratio.clamp(max=CAP) if mode.endswith("truncate") else torch.where(ratio > CAP, 0.0, ratio)
    return weight * clipped((logp - old).exp(), advantage)


def correction(mode: str) -> dict[str, Any]:
    return {"importance_sampling_correction": mode, "importance_sampling_cap": CAP, "old_logprobs": "recompute"}


CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
LOSSES = {
    "plain": lambda logp, _, engine, advantage: clipped((logp - engine).exp(), advantage),
    "delta": lambda logp, _, engine, advantage: clipped((logp - engine).exp(), advantage, cap=1.3),
    "sequence": lambda logp, _, engine, advantage: clipped((logp - engine).mean().exp().expand(len(logp)), advantage),
    "bonus": lambda logp, entropy, engine, advantage: clipped((logp - engine).exp(), advantage) - 0.3 * entropy,
} | {mode: partial(corrected, mode) for mode in CORRECTIONS}
SETTINGS = {
    "plain": {},
    "delta": {"delta": 1.3},
    "sequence": {"importance_sampling_level": "sequence"},
    "bonus": {"entropy_coef": 0.3},
} | {mode: correction(mode) for mode in CORRECTIONS}


def written_out(loss_of: Any, trainer: Any, groups: list[Group], dapo: bool) -> tuple[float, dict[str, Tensor]]:
    """Equal from the naive forward's log-probs and entropies, the loss in float64."""
    rows = plan_packs(with_advantages(groups, [1.0], "group"), tokens_per_pack=0, share_prompt=False, pack=False)
    naive = NaivePolicy(trainer.model, trainer.family, temperature=1.0)
    trainer.model.zero_grad()
    means, sums, tokens = [], [], 0
    for row in rows:
        pack = make_pack(row)
        logp, entropy = (each.double() for each in naive._forward(pack, with_bonus=True))
        for i, alone in enumerate(row):
            own, engine = pack.seq_ids == i, alone.completions[0].logp
            assert alone.advantages is not None and engine is not None
            loss = loss_of(logp[own], entropy[own], engine.double(), alone.advantages.double())
            means.append(loss.mean())
            sums.append(loss.sum())
            tokens += len(loss)
    total = torch.stack(sums).sum() / tokens if dapo else torch.stack(means).mean()
    total.backward()
    return float(total.detach()), gradients_of(trainer.model)


@pytest.mark.parametrize(
    ("name", "dapo"),
    [*((name, False) for name in SETTINGS), *((name, True) for name in ("sequence", "bonus", "sequence_mask"))],
)
def test_the_step_is_the_one_written_out(name, dapo, model, processor, make, tmp_path):
    groups, settings = groups_of(make, model), SETTINGS[name] | ({"loss_type": "dapo"} if dapo else {})
    trainer = trainer_of(model, processor, tmp_path, beta=0.0, **settings)
    trainer.reward_weights = [1.0]
    minibatch = generate(trainer, groups)
    trainer.model.zero_grad()
    loss, _, gradients = backward(trainer, minibatch.groups)
    expected, oracle = written_out(LOSSES[name], trainer, groups, dapo)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert relative(gradients, oracle) < 2e-5
    if name != "plain":
        assert relative(gradients, written_out(LOSSES["plain"], trainer, groups, dapo)[1]) > 1e-2


# The weights of the correction


def packed(*differences: list[float]) -> Pack:
    """Sequences whose old log-probs are these above the engine's."""
    made = group(prompt(3), *(len(each) for each in differences))
    for completion, given in zip(made.completions, differences, strict=True):
        completion.logp = -1 - torch.arange(len(given)) / 10
        completion.old_logp = completion.logp + torch.tensor(given)
    return make_pack([made])


LOG2 = math.log(2)
WEIGHTS = {
    "token_truncate": [1, 2, 3, 0.5, 1, 3, 2],
    "token_mask": [1, 2, 0, 0.5, 1, 0, 2],
    "sequence_truncate": [3, 3, 3, 0.5, 0.5, 3, 3],  # of 8, 0.5, 8
    "sequence_mask": [0, 0, 0, 0.5, 0.5, 0, 0],
}


@pytest.mark.parametrize(("mode", "expected"), WEIGHTS.items(), ids=WEIGHTS.keys())
def test_weights(mode, expected):
    pack = packed([0, LOG2, 2 * LOG2], [-LOG2, 0], [2 * LOG2, LOG2])
    metrics = set_importance_denominators([pack], mode, 3.0)
    found = make_pack(pack.groups)
    assert found.old_logp is not None and found.importance_denominator is not None
    weights = (found.old_logp - found.importance_denominator).exp().clamp(max=3.0)
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    ratios = [8, 0.5, 8] if mode.startswith("sequence") else [1, 2, 4, 0.5, 1, 4, 2]
    assert metrics == pytest.approx(
        {
            "rollout/importance_ratio": sum(ratios) / len(ratios),
            "rollout/importance_ratio_min": 0.5,
            "rollout/importance_ratio_max": max(ratios),
            "rollout/importance_cut": sum(ratio > 3 for ratio in ratios) / len(ratios),
        }
    )


def test_metrics_are_of_all_packs_but_dummies_and_none_corrects_nothing():
    packs = [packed([0.0], [0.0]), packed([LOG2, 3 * LOG2, 3 * LOG2]), replace(packed([9.0]), weight=0.0)]
    assert set_importance_denominators(packs, "none", 3.0) == {}
    assert all(make_pack(pack.groups).importance_denominator is None for pack in packs)
    metrics = set_importance_denominators(packs, "token_mask", 3.0)
    assert all(make_pack(pack.groups).importance_denominator is not None for pack in packs)
    assert metrics["rollout/importance_ratio"] == pytest.approx((1 + 1 + 2 + 8 + 8) / 5)
    assert metrics["rollout/importance_cut"] == pytest.approx(0.4)


def test_an_engine_without_logprobs_cannot_be_corrected():
    with pytest.raises(SettingError, match="importance_sampling_correction: the rollout engine reports no log-probs"):
        set_importance_denominators([replace(packed([0.0]), rollout_logp=None)], "token_mask", 3.0)


def test_the_ratio_is_of_the_full_distribution(model, processor, tmp_path):
    """With top_k the tokens are drawn from another distribution than the policy's; engine and policy agree, and the
    ratio says so. Against the log-probs that tokens were drawn with it would be the probability of the k tokens."""
    settings = {"top_k": 3, "temperature": 3.0, **correction("token_truncate")}
    trainer = trainer_of(model, processor, tmp_path, **settings)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["rollout/importance_ratio_min"] == pytest.approx(1, abs=1e-3)
    assert row["rollout/importance_ratio_max"] == pytest.approx(1, abs=1e-3)
    completions = [c for group in trainer.last_groups for c in group.completions]
    biased = torch.cat([(c.logp - c.sampling_logp).exp() for c in completions])
    assert float(biased.max()) < 1 and float(biased.mean()) < 0.9
    assert {"seconds/old", "rollout/logp_difference"} <= row.keys()


# The KL in the reward

ESTIMATORS = {"k1": lambda d: -d, "k2": lambda d: d**2 / 2, "k3": lambda d: d.exp() - d - 1}


def judged(groups: list[Group], old: Tensor, ref: Tensor, estimator: str, split: int) -> list[Group]:
    """The groups with their KL; log-probs by token id, packs under a budget of `split` tokens."""
    switches = {"share_vision": True, "share_prompt": True, "pack": True, "tokens_per_pack": split}
    alone: Any = SimpleNamespace(ranks=ALONE, sharding=None)
    runner = PackRunner(None, SimpleNamespace(**switches), alone)  # type: ignore[arg-type]
    unscored = [replace(each, advantages=None) for each in groups]
    for values, into in ((old, "old_logp"), (ref, "ref_logp")):
        runner.map(unscored, lambda pack, values=values: values[pack.targets], into=into, every=True)
    return with_kl(groups, estimator)


@pytest.mark.parametrize("split", [1000, 12])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kl_of_a_completion(estimator, split):
    random = torch.Generator().manual_seed(0)
    old, ref = (-torch.rand(2000, generator=random) for _ in range(2))
    groups = [group(prompt(4), 3, 1, 5, start=20), group(prompt(2), 2, 9, start=1000)]
    for before, after in zip(groups, judged(groups, old, ref, estimator, split), strict=True):
        assert after.kl is not None and after.rewards is before.rewards
        for completion, kl in zip(after.completions, after.kl.tolist(), strict=True):
            d = (ref - old)[completion.token_ids].double()
            assert kl == pytest.approx(float(ESTIMATORS[estimator](d).sum()), rel=1e-6)
            assert torch.equal(completion.old_logp, old[completion.token_ids])
            assert torch.equal(completion.ref_logp, ref[completion.token_ids])
        assert [c.text for c in after.completions] == [c.text for c in before.completions]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_rewards_less_kl(scale):
    groups = [
        replace(group(prompt(3), 2, 2), rewards=torch.tensor([[1.0], [0.0]]), kl=torch.tensor([4.0, 1.0])),
        replace(group(prompt(3), 2, 2), rewards=torch.tensor([[0.5], [0.5]]), kl=torch.tensor([0.0, 2.0])),
    ]
    rewards = torch.tensor([[2 - 0.4, 0 - 0.1], [1 - 0.0, 1 - 0.2]])  # weight 2, beta 0.1
    std = {"group": rewards.std(1, keepdim=True), "batch": rewards.std(), "none": 1 - 1e-4}[scale]
    expected = (rewards - rewards.mean(1, keepdim=True)) / (std + 1e-4)
    found = torch.stack([g.advantages for g in with_advantages(groups, [2.0], scale, kl_weight=0.1)])
    assert torch.allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("old", ["rollout", "recompute"])
def test_kl_in_reward_of_a_run(old, model, processor, make, tmp_path):
    """The KL is of the log-probs that old_logprobs names; the loss has none, and masked completions keep theirs."""
    settings = {"beta": 0.5, "kl": "k1", "kl_in_reward": True, "old_logprobs": old}
    trainer = trainer_of(model, processor, tmp_path, mask_truncated_completions=True, **settings)
    trainer.reward_weights = [1.0]
    for parameter in trainer.reference.model.parameters():
        parameter.mul_(1.05)
    groups = groups_of(make, model)
    minibatch = generate(trainer, groups)
    assert trainer.settings.beta == 0
    policy, reference = NaivePolicy(trainer.model, trainer.family, temperature=1.0), trainer.reference.model
    for before, after in zip(groups, minibatch.groups, strict=True):
        adjusted = []
        for completion in before.completions:
            alone = make_pack([replace(before, completions=(completion,), advantages=torch.zeros(1))])
            drawn = completion.logp if old == "rollout" else policy.logprobs(alone)
            kl = float((drawn - NaivePolicy(reference, trainer.family, temperature=1.0).logprobs(alone)).sum())
            adjusted.append(float(before.rewards[len(adjusted), 0]) - 0.5 * kl)
        rewards = torch.tensor(adjusted)
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        assert torch.allclose(after.advantages, expected, rtol=1e-4, atol=1e-5)
    rows = sum(len(pack.targets) for pack in trainer.runner.packs(minibatch.groups))
    assert rows == sum(len(c.token_ids) for g in groups for c in g.completions if c.finish_reason == "stop")
    _, metrics = trainer.backward(trainer.model, minibatch.groups)
    assert metrics["kl"] != 0  # measured still


def test_a_buffer_keeps_what_it_needs(model, processor, make, tmp_path):
    """KL, weights and metrics come back from a checkpoint."""
    settings = {"beta": 0.5, "kl_in_reward": True, "num_iterations": 2, **correction("sequence_mask")}
    trainer = trainer_of(model, processor, tmp_path, **settings)
    trainer.reward_weights = [1.0]
    minibatch = generate(trainer, groups_of(make, model))
    prompts = {group.prompt.sample.index: group.prompt for group in minibatch.groups}
    buffer, again = (Buffer(2, prompts.__getitem__) for _ in range(2))
    buffer.fill([minibatch])
    buffer.take()
    buffer.save(tmp_path)
    again.load(tmp_path)
    (found,) = again.minibatches
    assert found.metrics == minibatch.metrics and "rollout/importance_ratio" in found.metrics and again.used == 1
    for one, other in zip(found.groups, minibatch.groups, strict=True):
        assert torch.equal(one.kl, other.kl) and torch.equal(one.advantages, other.advantages)
        for mine, kept in zip(one.completions, other.completions, strict=True):
            for name in ("logp", "sampling_logp", "old_logp", "ref_logp", "importance_denominator"):
                assert torch.equal(getattr(mine, name), getattr(kept, name)), name


def test_a_buffer_of_an_old_checkpoint(tmp_path):
    """Log-probs stood apart from their completions, by place, where a completion contributed to the loss."""
    drawn, counted = ({"token_ids": torch.arange(3), "text": "", "finish_reason": "stop"} for _ in range(2))
    for each in (drawn, counted):
        each |= {name: -torch.ones(3) for name in ("logp", "sampling_logp")} | {"old_logp": None, "ref_logp": None}
    facts = {"old_logp": torch.zeros(3), "ref_logp": None, "trust_logp": 2 * torch.ones(3)}
    groups = [{"sample": 7, "rewards": None, "advantages": None, "completions": [drawn, counted]}]
    state = {"used": 1, "parts": [{"groups": groups, "log_probs": {1: facts}, "counts": {"packs": 2.0}}]}
    torch.save(state, tmp_path / ROLLOUTS)
    buffer = Buffer(2, {7: prompt(3)}.__getitem__)
    buffer.load(tmp_path)
    first, second = buffer.groups[0].completions
    assert (first.old_logp, first.importance_denominator, buffer.used) == (None, None, 1)
    assert second.old_logp.tolist() == [0, 0, 0] and second.importance_denominator.tolist() == [2, 2, 2]
