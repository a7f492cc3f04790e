"""Settings that take more of sharded weights than a pass: a KL in the reward, further rounds of rollouts, a reference
that follows the policy. Two processes (gloo, CPU) against one, or against two that hold all weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.vlmr1.scale.forked_ranks import run_forked
from tests.vlmr1.scale.two_ranks import assert_same, computed, metrics, resumable, words
from vlmr1.arguments import parse_config
from vlmr1.models import load_model
from vlmr1.reference import REFERENCE
from vlmr1.run import TINY, model_path, train

pytestmark = pytest.mark.slow
SHARDED = ("zero3", "fsdp2")
# Of the second generation one rank has 99 tokens, in two packs, the other 94, in one.
KL = {"beta": 0.04, "kl_in_reward": "true", "old_logprobs": "recompute", "tokens_per_pack": 96}
SYNC = {"sync_ref_model": "true", "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
SYNC |= {"learning_rate": 1e-3, "adam_epsilon": 1e-5}  # what is only rounding moves no weight
ROUNDS = {"beta": 0.0, "dynamic_sampling": "true", "dynamic_sampling_max_rounds": 2, "save_strategy": "no"}


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Of one process: metrics, and the reference of the last checkpoint."""
    output = folder / "alone"
    train(parse_config(words(folder, output, prompts_per_device=2, use_cpu="true", **KL, **SYNC)))
    return metrics(output), load_file(output / "checkpoint-4" / REFERENCE)


@pytest.mark.parametrize("engine", SHARDED)
def test_a_kl_in_the_reward_to_a_reference_that_follows(engine, folder, alone, tmp_path):
    """Mixed after updates 2 and 4; a run that goes on from checkpoint 3 takes the reference from there, bit for bit."""
    expected, single = alone
    found = run_forked(engine, folder, tmp_path / "run", **KL, **SYNC)
    assert_same(found, expected)
    for one, other in zip(found, expected, strict=True):
        assert one["completion_kl"] == pytest.approx(other["completion_kl"], rel=1e-4, abs=1e-6)
    assert found[2]["completion_kl"] > 1e-4  # the policy has left the reference
    reference = load_file(tmp_path / "run" / "checkpoint-4" / REFERENCE)
    assert reference.keys() == single.keys()
    start = dict(load_model(model_path(TINY)).named_parameters())
    for name, value in reference.items():
        torch.testing.assert_close(value, single[name], rtol=1e-4, atol=1e-6, msg=lambda said, at=name: f"{at}: {said}")
        assert not torch.equal(value, start[name]), name

    again = run_forked(engine, folder, resumable(tmp_path / "run", tmp_path / "resumed"), **KL, **SYNC)
    assert [computed(step) for step in again] == [computed(step) for step in found]
    resumed = load_file(tmp_path / "resumed" / "checkpoint-4" / REFERENCE)
    assert all(torch.equal(value, resumed[name]) for name, value in reference.items())


@pytest.fixture(scope="module")
def in_rounds(folder: Path) -> list[dict[str, float]]:
    return run_forked("ddp", folder, folder / "rounds", **ROUNDS)


@pytest.mark.parametrize("engine", SHARDED)
def test_further_rounds(engine, folder, in_rounds, tmp_path):
    """Two processes that hold all weights draw the same; one has no group to replace in the first generation."""
    found = run_forked(engine, folder, tmp_path / "run", **ROUNDS)
    assert_same(found, in_rounds)
    names = [name for name in in_rounds[0] if name.startswith("dynamic_sampling/")]
    for one, other in zip(found, in_rounds, strict=True):
        assert [one.get(name) for name in names] == pytest.approx([other.get(name) for name in names])
    assert found[0]["dynamic_sampling/groups_replaced"] == found[0]["dynamic_sampling/rounds"] == 1
