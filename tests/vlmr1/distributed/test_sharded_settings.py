"""Settings that take more of sharded weights than a pass: a KL in the reward, further rounds of rollouts, a reference
that follows the policy. Two processes (gloo, CPU) against one, or against two that hold all weights."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.forked_ranks import assert_resumes, run_forked
from tests.helpers.two_ranks import assert_close, assert_moved, assert_same, run_alone
from vlmr1.grpo import trainer
from vlmr1.grpo.pack_runner import PackRunner
from vlmr1.grpo.reference import REFERENCE
from vlmr1.models import load_model
from vlmr1.tiny import TINY, model_path

pytestmark = pytest.mark.slow
SHARDED = ("zero3", "fsdp2")
# Of the second generation one rank has 99 tokens, in two packs, the other 94, in one: PLANS.
KL = {"beta": 0.04, "kl_in_reward": "true", "old_logprobs": "recompute", "tokens_per_pack": 96}
PLANS = {(1, 1), (1, 2)}  # packs of each rank's two generations
SYNC = {"sync_ref_model": "true", "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
SYNC |= {"learning_rate": 1e-3, "adam_epsilon": 1e-5}  # what is only rounding moves no weight
ADAPTER = {"use_peft": "true", "lora_r": 4, "lora_alpha": 8, "lora_modules_to_save": "visual.merger"}
ADAPTER |= {"reference": "copy", "beta": 0.04}
ROUNDS = {"beta": 0.0, "dynamic_sampling": "true", "dynamic_sampling_max_rounds": 2, "save_strategy": "no"}


@dataclass(frozen=True)
class Counting:
    """In a rank: how many packs of its own each KL is of, and of how many log-probs are computed."""

    folder: Path

    def __call__(self) -> None:
        plans, passes, of_kl = [], [], []  # the last: whether packs are made for a KL
        make, add = PackRunner.make_packs, trainer.GRPOTrainer.add_logprobs

        def make_packs(runner: Any, plan: Any, **options: Any) -> Any:
            packs = make(runner, plan, **options)
            if of_kl == [True]:  # of the reference: those of the old policy are as many
                of_kl.append(False)
                plans.append(len(plan))
                passes.append(len(packs))
                counted = self.folder / f"counted-{os.environ['RANK']}.json"
                counted.write_text(json.dumps([plans, passes]), encoding="utf-8")
            return packs

        def add_logprobs(self: Any, model: Any, groups: Any, *, every: bool = False) -> None:
            of_kl[:] = [every]
            add(self, model, groups, every=every)
            of_kl.clear()

        PackRunner.make_packs, trainer.GRPOTrainer.add_logprobs = make_packs, add_logprobs  # type: ignore[assignment]

    def counted(self) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
        """(packs, passes) by generation, of both ranks."""
        read = [json.loads((self.folder / f"counted-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
        plans, passes = zip(*read, strict=True)
        return set(map(tuple, plans)), set(map(tuple, passes))


def reference_of(run: Path) -> dict[str, torch.Tensor]:
    """That of the last checkpoint."""
    return load_file(run / "checkpoint-4" / REFERENCE)


@pytest.fixture(scope="module")
def alone(folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """For one process: metrics, and the reference."""
    return run_alone(folder, folder / "alone", **KL, **SYNC), reference_of(folder / "alone")


def assert_near(reference: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert_close(reference, expected, rtol=1e-4, atol=1e-6)


def assert_resumed(engine: str, folder: Path, run: Path, update: int, **more: Any) -> None:
    """Metrics and reference, bit for bit."""
    other = reference_of(assert_resumes(engine, folder, run, update, **more))
    assert all(torch.equal(value, other[name]) for name, value in reference_of(run).items())


def assert_same_kl(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert_same(found, expected)
    for one, other in zip(found, expected, strict=True):
        assert one["completion_kl"] == pytest.approx(other["completion_kl"], rel=1e-4, abs=1e-6)
    assert found[2]["completion_kl"] > 1e-4  # the policy has left the reference


@pytest.mark.parametrize("engine", SHARDED)
def test_a_kl_in_the_reward_to_a_reference_that_follows(engine, folder, alone, tmp_path):
    """Mixed after updates 2 and 4. With the reference of checkpoint 2 the second generation is computed; checkpoint 3
    holds what was computed with it."""
    expected, single = alone
    counting = Counting(tmp_path)
    found = run_forked(engine, folder, tmp_path / "run", prepare=counting, save_steps=1, **KL, **SYNC)
    assert counting.counted() == (PLANS, {(1, 2)})
    assert_same_kl(found, expected)
    reference = reference_of(tmp_path / "run")
    assert_near(reference, single)
    start = dict(load_model(model_path(TINY)).named_parameters())
    for name, value in reference.items():
        assert not torch.equal(value, start[name]), name

    for update in (2, 3):
        assert_resumed(engine, folder, tmp_path / "run", update, save_steps=1, **KL, **SYNC)


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_a_kl_in_the_reward_where_weights_are_whole(engine, folder, alone, tmp_path):
    """Ranks make passes for their own packs only."""
    counting = Counting(tmp_path)
    found = run_forked(engine, folder, tmp_path / "run", prepare=counting, **KL, **SYNC)
    assert counting.counted() == (PLANS, PLANS)
    assert_same_kl(found, alone[0])
    assert_near(reference_of(tmp_path / "run"), alone[1])


def test_a_copied_adapter_that_follows(folder, tmp_path):
    """The reference is a copy of the policy with its adapter, of which adapter and projector follow."""
    more = ADAPTER | SYNC | {"save_steps": 2}
    expected, single = run_alone(folder, folder / "adapter", **more), reference_of(folder / "adapter")
    found = run_forked("fsdp2", folder, tmp_path / "run", **more)
    assert_same(found, expected)
    assert found[-1]["kl"] > 1e-6
    reference = reference_of(tmp_path / "run")
    assert_near(reference, single)
    assert {"lora_A", "lora_B", "modules_to_save"} <= {part for name in reference for part in name.split(".")}
    assert_moved(reference, single)
    assert_resumed("fsdp2", folder, tmp_path / "run", 2, **more)


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
