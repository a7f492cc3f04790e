"""The step's loss is the one that TRL's own GRPOTrainer computes on the same log-probs and advantages.

What runs of TRL is `GRPOTrainer._compute_loss`, and `_generate_and_score_completions` for the advantages, on
an instance made by `__new__` with the attributes that they read. Replaced are the model pass
(`_get_per_token_logps_and_entropies` gives the log-probs it is told), generation and reward functions.
`use_bias_correction_kl`, on by default in TRL, is off: it multiplies the KL by the ratio, which no
setting does here.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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


def trl_loss(logp: Tensor, ref: Tensor, groups: list[Group], config: GRPOConfig) -> Tensor:
    """TRL's, on one padded batch of all sequences."""
    trl = pytest.importorskip("trl")
    completions = [completion for group in groups for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]

    def padded(rows: Tensor) -> Tensor:
        return pad_sequence(list(rows.split(lengths)), batch_first=True)  # [B, C]

    trainer: Any = trl.GRPOTrainer.__new__(trl.GRPOTrainer)
    gspo = config.loss_type == "gspo"
    vars(trainer).update(
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(logp), padded(torch.ones_like(logp)), None),
        loss_type="grpo" if gspo else config.loss_type,
        importance_sampling_level="sequence" if gspo else config.importance_sampling_level or "token",
        beta=config.beta,
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        max_completion_length=config.max_completion_length,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        args=SimpleNamespace(delta=config.delta, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)},
    )
    mask = padded(torch.ones(len(logp), dtype=torch.long))
    inputs = {
        "prompt_ids": torch.zeros(len(completions), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(completions), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": torch.cat([group.advantages for group in groups if group.advantages is not None]),
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": padded(ref),
    }
    old = [completion.logp for completion in completions if completion.logp is not None]
    if old:
        inputs["old_per_token_logps"] = padded(torch.cat(old))
    return trainer._compute_loss(None, inputs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_loss_and_gradient_are_those_of_trl(case: Case, tmp_path: Path) -> None:
    config = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, num_generations=2, **case.settings)
    random = torch.Generator().manual_seed(0)
    groups = groups_of(case, random)
    old = torch.cat([known_logp(completion) for group in groups for completion in group.completions])
    ref = old + 0.3 * torch.randn(len(old), generator=random)
    logp = (old + case.noise * torch.randn(len(old), generator=random)).requires_grad_()
    loss = our_loss(logp, ref, groups, config, case.packs)
    expected = trl_loss(logp, ref, groups, config)
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


def trl_advantages(rewards: Tensor, weights: Tensor, num_generations: int, scale: str, aggregation: str) -> Tensor:
    """rewards [B, R] -> [B] by TRL's `_generate_and_score_completions`, generation and rewards replaced."""
    trl = pytest.importorskip("trl")
    size, count = rewards.shape
    trainer: Any = trl.GRPOTrainer.__new__(trl.GRPOTrainer)
    vars(trainer).update(
        _generate=lambda _: ([[1]] * size, [[1]] * size, None, [""] * size, None, {}, None, None),
        _calculate_rewards=lambda *_: rewards,
        num_generations=num_generations,
        scale_rewards=scale,
        reward_weights=weights,
        reward_func_names=[str(i) for i in range(count)],
        multi_objective_aggregation=aggregation,
        reward_funcs=[None] * count,
        environment_factories=None,
        environments=None,
        tools=None,
        mask_truncated_completions=False,
        pad_to_multiple_of=None,
        num_iterations=1,
        use_vllm=False,
        beta=0.0,
        log_multimodal=False,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        args=SimpleNamespace(
            per_device_train_batch_size=size,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        accelerator=SimpleNamespace(device=torch.device("cpu"), process_index=0, gather=lambda x: x),
        _metrics={"train": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "rewards": defaultdict(list), "advantages": []},
        _pending_extra_logs={},
        _pending_metrics={},
    )
    return trainer._generate_and_score_completions([{"prompt": ""}] * size)["advantages"]
