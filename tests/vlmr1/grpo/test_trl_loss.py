"""The step's loss is the one that TRL's own GRPOTrainer computes on the same log-probs and advantages."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.trl import trl_advantages, trl_loss
from vlmr1.config import GRPOConfig
from vlmr1.grpo.advantages import with_advantages
from vlmr1.grpo.loss import Objective, normalizer
from vlmr1.grpo.packing import make_pack, plan_packs
from vlmr1.types import Completion, Group, Prompt, Sample

RAGGED = ((3, 5, 2, 7), (4, 6, 9, 2))  # completion lengths, by group


@dataclass(frozen=True)
class Case:
    """Settings of a run, and what its groups are like."""

    settings: dict[str, Any]
    lengths: tuple[tuple[int, ...], ...] = RAGGED
    noise: float = 0.1  # of the policy against the one that sampled, in nats
    equal_rewards: bool = False
    on_policy: bool = False  # the old log-probs are not known
    packs: int = 1


CASES = {
    "grpo": Case({"loss_type": "grpo", "beta": 0.0}),
    "bnpo": Case({"loss_type": "bnpo", "beta": 0.0}),
    "dapo": Case({"loss_type": "dapo", "beta": 0.0}),
    "dr_grpo": Case({"loss_type": "dr_grpo", "beta": 0.0, "max_completion_length": 12}),
    "cispo": Case({"loss_type": "cispo", "beta": 0.0, "epsilon_high": 1.2}, noise=0.4),
    "gspo": Case({"loss_type": "gspo", "beta": 0.0, "epsilon": 0.05}, noise=0.4),
    "asymmetric_clip": Case({"beta": 0.0, "epsilon": 0.1, "epsilon_high": 0.28}, noise=0.4),
    "clipped_on_both_sides": Case({"beta": 0.0}, noise=1.0),
    "reference": Case({"beta": 0.04}),
    "dapo_reference": Case({"loss_type": "dapo", "beta": 0.1}, noise=0.4),
    "gspo_reference": Case({"loss_type": "gspo", "beta": 0.1}, noise=0.4),
    "several_packs": Case({"beta": 0.04, "tokens_per_pack": 16}, packs=3),
    "bnpo_several_packs": Case({"loss_type": "bnpo", "beta": 0.04, "tokens_per_pack": 16}, packs=3),
    "naive_packs": Case({"beta": 0.04, "share_prompt": False, "pack": False}, packs=2),
    "equal_lengths": Case({"beta": 0.04}, lengths=((6, 6, 6),)),
    "length_one": Case({"beta": 0.04}, lengths=((1, 4), (1, 1))),
    "equal_rewards": Case({"beta": 0.04}, equal_rewards=True),
    "delta": Case({"beta": 0.0, "delta": 1.5}, noise=1.0),
    "delta_reference": Case({"beta": 0.1, "delta": 1.3, "loss_type": "dapo"}, noise=0.4),
    "sequence_level": Case({"beta": 0.1, "importance_sampling_level": "sequence", "epsilon": 0.05}, noise=0.4),
    "dapo_sequence_level": Case(
        {"loss_type": "dapo", "beta": 0.0, "importance_sampling_level": "sequence", "delta": 1.2}, noise=0.4
    ),
    "on_policy": Case({"beta": 0.04}, on_policy=True),
}


def groups_of(case: Case, random: torch.Generator) -> list[Group]:
    """Groups without images. A token's id is its place in the step, so that targets index a step's rows."""
    groups, at = [], 0
    for index, lengths in enumerate(case.lengths):
        ids = torch.arange(2 + index)
        prompt = Prompt(Sample([], (), "", "made", index), ids, ids.expand(3, -1))
        completions = []
        for length in lengths:
            logp = None if case.on_policy else -3 * torch.rand(length, generator=random)
            completions.append(Completion(torch.arange(at, at + length), logp, logp, "", "stop"))
            at += length
        rewards = torch.rand(len(lengths), 1, generator=random) * (not case.equal_rewards)
        groups.append(Group(prompt, tuple(completions), rewards))
    return with_advantages(groups, [1.0], "group")


def known_logp(completion: Completion) -> Tensor:
    return torch.full(completion.token_ids.shape, -1.0) if completion.logp is None else completion.logp


def our_loss(logp: Tensor, ref: Tensor, groups: list[Group], config: GRPOConfig, packs: int) -> Tensor:
    """As the trainer adds it up over the packs of a step; logp and ref [N] of the whole step."""
    settings = config.objective()
    objective = Objective(settings, normalizer(groups, settings))
    switches = {"share_prompt": config.share_prompt, "pack": config.pack}
    rows = plan_packs(groups, tokens_per_pack=config.tokens_per_pack, **switches)
    assert len(rows) == packs
    total = torch.zeros(())
    for row in rows:
        pack = make_pack(row)
        pack = replace(pack, old_logp=pack.rollout_logp, ref_logp=ref[pack.targets] if config.beta > 0 else None)
        total = total + objective.from_logprobs(logp[pack.targets], pack)[0]
    return total


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_are_those_of_trl(case: Case, tmp_path: Path) -> None:
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, num_generations=2, **case.settings)
    random = torch.Generator().manual_seed(0)
    groups = groups_of(case, random)
    old = torch.cat([known_logp(completion) for group in groups for completion in group.completions])
    ref = old + 0.3 * torch.randn(len(old), generator=random)
    logp = (old + case.noise * torch.randn(len(old), generator=random)).requires_grad_()
    loss = our_loss(logp, ref, groups, config, case.packs)
    completions = [completion for group in groups for completion in group.completions]
    advantages = torch.cat([group.advantages for group in groups])
    rows = {"logp": logp, "ref_logp": ref, "advantages": advantages} | ({} if case.on_policy else {"old_logp": old})
    lengths = [len(completion.token_ids) for completion in completions]
    expected = trl_loss(config.objective(), lengths, rows, torch.ones_like(logp))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    gradient, expected_gradient = (torch.autograd.grad(each, logp)[0] for each in (loss, expected))
    assert float(expected_gradient.norm()) > 1e-4
    assert float((gradient - expected_gradient).norm()) <= 1e-5 * float(expected_gradient.norm())
    if case.noise == 1.0:
        assert 0 < int((expected_gradient == 0).sum()) < len(logp)


@pytest.mark.parametrize("missing", [(), ((0, 1),), ((0, 0), (0, 1)), ((1, 0), (1, 1), (4, 0))], ids=str)
@pytest.mark.parametrize("scale", ["group", "batch", "none", "normalize_then_sum"])
@pytest.mark.parametrize("rewards", [[[0.1, 0.9, 0.4], [0.5, 0.5, 0.5]], [[0.1, 0.9, 0.4], [0.0, 1.0, 1.0]]])
def test_advantages_are_those_of_trl(
    scale: str, rewards: list[list[float]], missing: tuple[tuple[int, int], ...]
) -> None:
    """Two functions; `missing` are completions and functions that do not apply to them."""
    prompt = Prompt(Sample([], (), "", "made", 0), torch.arange(2), torch.arange(2).expand(3, -1))
    completion = Completion(torch.arange(1), None, None, "", "stop")
    weights = [1.0, 0.5]
    columns = [torch.stack([torch.tensor(row), 1 - torch.tensor(row).square()], 1) for row in rewards]  # [G, 2]
    for place, function in missing:
        columns[place // 3][place % 3, function] = torch.nan
    groups = [Group(prompt, (completion,) * len(row), column) for row, column in zip(rewards, columns, strict=True)]
    scale, aggregation = ("group", scale) if scale == "normalize_then_sum" else (scale, "sum_then_normalize")
    made = with_advantages(groups, weights, scale, aggregation=aggregation)
    ours = torch.cat([group.advantages for group in made])  # type: ignore[misc]
    expected = trl_advantages(torch.cat(columns), torch.tensor(weights), len(rewards[0]), scale, aggregation)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
