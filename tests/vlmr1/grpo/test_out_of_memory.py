"""Memory that runs out in a pass: the step is made again in smaller packs, and is the same step."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import steps
from tests.helpers.maker import Maker
from tests.helpers.slow import mostly_slow
from tests.helpers.steps import NAIVE, assert_equal_steps
from tests.helpers.trainers import trainer_of
from tests.helpers.updates import Step, as_drawn, gradients_of
from vlmr1.errors import SettingError
from vlmr1.grpo.pack_budget import BUDGET, PackBudget, PackTooLarge, catch_oom
from vlmr1.grpo.packing import make_pack, tokens_of
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.models import load_model
from vlmr1.tiny import CHECKPOINT
from vlmr1.types import Group

# What packing changes: nothing else of a step may differ.
OF_PACKS = ("packs", "packed_tokens", "repeated_prompt_tokens", "tokens_per_pack")


def full(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nof a GPU that is not here")


@pytest.fixture(scope="module")
def shipped() -> Any:
    """In float64, where another order of additions does not show at 1e-6."""
    return load_model(CHECKPOINT, dtype=torch.float64)


@pytest.fixture
def groups(shipped, processor, image_files) -> list[Group]:
    """Three groups of four; the last has the image of the first."""
    make = Maker(shipped, processor, image_files)
    lengths = {"Locate the digit 7.": (112, (5, 9, 3, 12)), "Where is the digit 3 on it?": (140, (8, 2, 10, 6))}
    lengths["Locate the digit 2."] = (112, (7, 4, 1, 5))
    return [make.group(make.prompt(text, (size,)), each) for text, (size, each) in lengths.items()]


def make_trainer(model: Any, processor: Any, output: Path, **settings: Any) -> GRPOTrainer:
    return steps.trainer_of(model, processor, output, [fourths], num_generations=4, **settings)


def fourths(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [float(i % 4) + 0.1 * (i // 4) for i in range(len(completions))]


class Failures:
    """Memory runs out in the given calls of a phase, the first being 1; `passes` counts all of them."""

    def __init__(self, trainer: GRPOTrainer, where: dict[str, set[int]], raises: Any = full):
        self.trainer, self.where, self.raises = trainer, where, raises
        self.passes = dict.fromkeys(("reference", "old", "forward", "backward"), 0)
        self.gradients: list[int] = []  # parameters that had one already when a backward failed
        for phase, policy, name in (
            ("reference", trainer.reference, "logprobs"),
            ("old", trainer.policy, "logprobs"),
            ("forward", trainer.policy, "loss"),
        ):
            if policy is not None:
                setattr(policy, name, self.failing(phase, getattr(policy, name)))
        # The decoder's first layer: by then backward has been through all the others.
        parameter = trainer.model.model.language_model.layers[0].mlp.down_proj.weight
        parameter.register_hook(self.in_backward)

    def failing(self, phase: str, run: Any) -> Any:
        return lambda *arguments: self.count(phase) or run(*arguments)

    def in_backward(self, gradient: torch.Tensor) -> None:
        self.gradients.append(sum(p.grad is not None for p in self.trainer.model.parameters()))
        self.count("backward")

    def count(self, phase: str) -> None:
        self.passes[phase] += 1
        if self.passes[phase] in self.where.get(phase, ()):
            self.raises()


def step(trainer: GRPOTrainer, groups: list[Group]) -> Step:
    """Loss, metrics and gradients of one training step on these completions."""
    trainer.rollout = lambda prompts: [replace(each, rewards=None, advantages=None) for each in as_drawn(groups)]
    trainer.engine.stats.seconds = 1.0
    loss = trainer.training_step(trainer.model, [group.prompt for group in groups])
    values = trainer.pending.steps[-1].values
    values = {k: v for k, v in values.items() if k not in OF_PACKS and not k.startswith("rollout/")}
    return float(loss), values, gradients_of(trainer.model)


RECOMPUTE = {"old_logprobs": "recompute", "num_iterations": 2}
CASES = {
    "forward of the only pack": ({}, {"forward": {1}}),
    "forward, three times in a row": ({}, {"forward": {1, 2, 3}}),
    "backward": ({}, {"backward": {1}}),
    "backward of a later pack": ({"tokens_per_pack": 100}, {"backward": {2}}),
    "backward again and again": ({}, {"backward": {1, 3, 6}}),
    "reference": ({}, {"reference": {1, 2}}),
    "old": (RECOMPUTE, {"old": {1, 3}}),
    "everywhere": (RECOMPUTE, {"reference": {1}, "old": {2}, "backward": {2}}),
    "frozen tower": ({"freeze_vision": True}, {"reference": {1}, "forward": {1}, "backward": {1}}),
    "one group a row": ({"pack": False}, {"forward": {2}, "backward": {1}}),
    "prompts not shared": ({"share_prompt": False}, {"forward": {1}, "backward": {2}}),
    "naive": (NAIVE, {"reference": {2}, "backward": {1}}),
    "no reference": ({"beta": 0.0}, {"forward": {1}, "backward": {1}}),
    "checkpointing": ({"gradient_checkpointing": True}, {"forward": {1}, "backward": {2}}),
}


QUICK = ("forward of the only pack", "backward of a later pack", "old")


@pytest.mark.parametrize(("settings", "where"), mostly_slow(CASES, *QUICK))
def test_the_step_is_the_undisturbed_one(settings, where, shipped, groups, processor, tmp_path):
    undisturbed = make_trainer(shipped, processor, tmp_path, **settings)
    expected = step(undisturbed, groups)
    trainer = make_trainer(shipped, processor, tmp_path, **settings)
    failures = Failures(trainer, where)
    found = step(trainer, groups)
    assert_equal_steps(found, expected, tolerance=1e-6)
    assert trainer.runner.budget.out_of_memory == sum(len(calls) for calls in where.values())
    counts = [each.pending.steps[-1].values for each in (undisturbed, trainer)]
    assert counts[1]["packs"] > counts[0]["packs"]
    assert counts[1]["tokens_per_pack"] < counts[0]["tokens_per_pack"] or settings is NAIVE
    assert all(failures.passes[phase] > max(calls) for phase, calls in where.items())
    if "backward" in where:
        assert failures.gradients[min(where["backward"]) - 1] > 0  # so there was something to take back


@pytest.mark.parametrize("settings", [{}, NAIVE], ids=["shared", "naive"])
def test_a_single_completion_that_does_not_fit(settings, shipped, groups, processor, tmp_path):
    trainer = make_trainer(shipped, processor, tmp_path, **settings)
    failures = Failures(trainer, {"forward": set(range(1, 99))})
    prompt, length = groups[0].prompt, len(groups[0].completions[0].token_ids)
    with pytest.raises(SettingError) as error:
        step(trainer, groups)
    words = [f"one completion of {length} tokens with its prompt of {len(prompt.input_ids)}", prompt.sample.source]
    words += ["tokens_per_pack", "max_completion_length", "Tried to allocate 2.00 GiB."]
    assert all(word in str(error.value) for word in words)
    assert "not here" not in str(error.value)
    assert failures.passes["forward"] <= 6  # 12 completions, halved each time


@pytest.mark.parametrize("phase", ["reference", "forward", "backward"])
def test_other_errors_are_not_caught(phase, shipped, groups, processor, tmp_path):
    def broken() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    trainer = make_trainer(shipped, processor, tmp_path)
    failures = Failures(trainer, {phase: {1}}, broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        step(trainer, groups)
    assert failures.passes[phase] == 1 and trainer.runner.budget.out_of_memory == 0


def test_nothing_of_the_failed_pass_is_kept(shipped, groups, processor, tmp_path, monkeypatch):
    """When the smaller packs are tried, the activations are gone, and blocks have been given back."""
    trainer = make_trainer(shipped, processor, tmp_path)
    order: list[str] = []
    alive: list[Any] = []
    loss_of = trainer.policy.loss

    def failing(pack: Any, objective: Any) -> Any:
        loss, metrics = loss_of(pack, objective)
        if not alive:
            alive.append(weakref.ref(loss))
            order.append("failed")
            full()
        order.append("activations alive" if alive[0]() is not None else "retried")
        return loss, metrics

    trainer.policy.loss = failing
    monkeypatch.setattr("vlmr1.grpo.pack_budget.gc.collect", lambda: order.append("collect"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("empty"))
    trainer.rollout = lambda prompts: as_drawn(groups)
    (minibatch,) = trainer.generate(trainer.model, [])
    monkeypatch.setattr("vlmr1.grpo.pack_budget.torch.cuda.is_initialized", lambda: bool(alive) and len(order) == 2)
    trainer.backward(trainer.model, minibatch.groups)
    assert order == ["failed", "collect", "empty", "retried", "retried"]


def test_the_budget_is_halved_by_what_failed(groups):
    """Three groups: the part with two of them; one group: its prompt and the larger half of its branches."""
    budget = PackBudget(10_000)
    sizes = [tokens_of(group) for group in groups]
    budget.shrink(PackTooLarge(make_pack(groups), ""))
    assert budget.tokens == min(max(sizes[0] + sizes[1], sizes[2]), max(sizes[0], sizes[1] + sizes[2]))
    budget.shrink(PackTooLarge(make_pack(groups[:1]), ""))
    assert budget.tokens == len(groups[0].prompt.input_ids) + (3 - 1) + (12 - 1)
    small = PackBudget(5)  # of rows that are not packed, which may have more
    small.shrink(PackTooLarge(make_pack(groups[:1]), ""))
    assert small.tokens == 5 and small.limit == budget.tokens


def test_catch_oom_takes_out_of_memory_only(groups):
    pack = make_pack(groups)
    assert catch_oom(pack, lambda pack: len(pack.groups)) == 3
    with pytest.raises(PackTooLarge, match="Tried to allocate") as error:
        catch_oom(pack, full)
    assert error.value.pack is pack and error.value.__context__ is None
    with pytest.raises(MemoryError):
        catch_oom(pack, lambda pack: bytearray(2**62))


def test_a_run_goes_on_with_the_packs_that_it_had(model, processor, tmp_path):
    """Memory runs out in the second of four updates on one generation, in the middle of its buffer; the checkpoint
    after it is gone on from with bit-equal weights, in packs as small."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "steps_per_generation": 2}
    settings |= {"num_iterations": 2, "temperature": 3.0, "learning_rate": 1e-4, "logging_steps": 1}
    whole = trainer_of(model, processor, tmp_path, **settings)
    failures = Failures(whole, {"forward": {2}})
    whole.train()
    limits = json.loads((tmp_path / "checkpoint-2" / "pack_budget.json").read_text())
    assert limits == {"tokens": whole.runner.budget.tokens, "limit": whole.runner.budget.limit, "times": 1}
    again = trainer_of(model, processor, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.runner.budget.tokens == whole.runner.budget.tokens and failures.passes["forward"] > 5
    for (name, one), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    rows = [[row for row in each.state.log_history if "kl" in row] for each in (whole, again)]
    assert [row["out_of_memory"] for row in rows[0]] == [0, 1, 1, 1]
    assert [row["packs"] for row in rows[0]] == [1, 2, 2, 2]  # memory does not run out any more
    assert [row["tokens_per_pack"] for row in rows[0]] == [16384] + 3 * [whole.runner.budget.tokens]
    assert rows[1][-1]["loss"] == rows[0][-1]["loss"] and rows[1][-1]["packs"] == 2


def test_a_budget_is_saved_where_memory_ran_out(groups, tmp_path):
    budget = PackBudget(10_000)
    budget.save(tmp_path)
    assert not (tmp_path / BUDGET).exists()
    budget.load(tmp_path)
    assert (budget.tokens, budget.limit, budget.out_of_memory) == (10_000, None, 0)
    budget.shrink(PackTooLarge(make_pack(groups), ""))
    budget.save(tmp_path)
    other = PackBudget(10_000)
    other.load(tmp_path)
    assert vars(other) == vars(budget) and other.tokens < 10_000
