"""Groups without signal give way to groups of other prompts: which, in which order, how often, and after a resume."""

import shutil
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.digit_runs import command, weights
from tests.helpers.threads import on_ranks
from tests.helpers.tiny_runs import metrics
from tests.helpers.trainers import trainer_of
from vlmr1.cli import main
from vlmr1.grpo.buffer import ROLLOUTS
from vlmr1.grpo.dynamic_sampling import RESERVOIR, PromptReservoir, has_equal_rewards, resample
from vlmr1.grpo.reference import REFERENCE
from vlmr1.rewards.registry import get_reward
from vlmr1.tiny import digits
from vlmr1.types import Completion, Group, Prompt, Sample

# The order of further prompts


def test_reservoir_takes_every_row_once_a_turn():
    reservoir = PromptReservoir(range(7), seed=3)
    turns = [reservoir.take(7, ()) for _ in range(3)]
    assert all(sorted(turn) == list(range(7)) for turn in turns) and len({tuple(turn) for turn in turns}) == 3
    assert reservoir.position == 21
    again = PromptReservoir(range(7), seed=3)
    assert [again.take(1, ())[0] for _ in range(7)] == turns[0]
    assert PromptReservoir(range(7), seed=4).take(7, ()) != turns[0]


def test_reservoir_passes_over_held_samples():
    """Samples 10, 20, ... of places 0, 1, ...; those that are held have had their turn."""
    reservoir = PromptReservoir(range(10, 80, 10), seed=0)
    order = PromptReservoir(range(7), seed=0).take(7, ())
    held = {10 * (order[0] + 1), 10 * (order[2] + 1)}
    assert reservoir.take(2, held) == [order[1], order[3]] and reservoir.position == 4
    assert reservoir.take(1, ()) == [order[4]]
    few = PromptReservoir(range(4), seed=0)
    assert sorted(few.take(9, {1, 2})) == [0, 3] and few.position == 4  # what there is
    assert few.take(3, {0, 1, 2, 3}) == [] and PromptReservoir([], seed=0).take(1, ()) == []


def test_reservoir_gives_no_row_twice_at_once():
    """Where one permutation ends and the next begins, a row may come up again."""
    counts = []
    for seed in range(8):
        reservoir = PromptReservoir(range(4), seed)
        reservoir.take(2, ())
        taken = reservoir.take(4, ())
        assert len(set(taken)) == len(taken)
        counts.append(len(taken))
    assert min(counts) < 4 and reservoir.position == 6


def test_reservoir_goes_on_from_a_checkpoint(tmp_path):
    whole, reservoir = PromptReservoir(range(5), seed=1), PromptReservoir(range(5), seed=1)
    every = [whole.take(3, ()) for _ in range(4)]
    assert [reservoir.take(3, ()) for _ in range(2)] == every[:2]
    reservoir.save(tmp_path)
    again = PromptReservoir(range(5), seed=1)
    again.load(tmp_path)
    assert [again.take(3, ()) for _ in range(2)] == every[2:]


# Rounds


def group(sample: int, *rewards: float, tokens: int = 2) -> Group:
    prompt = Prompt(Sample([], (), "", "", sample), torch.zeros(3, dtype=torch.int64), torch.zeros(3, 3))
    completions = tuple(Completion(torch.zeros(tokens, dtype=torch.int64), None, None, "", "stop") for _ in rewards)
    return Group(prompt, completions, torch.tensor([[reward, 1.0] for reward in rewards]))


class Draws:
    """Draws groups whose rewards differ for the samples that are named; remembers what it was asked for."""

    def __init__(self, good: set[int]):
        self.good = good
        self.asked: list[tuple[int, list[int]]] = []

    def __call__(self, places: list[int], number: int) -> list[Group]:
        self.asked.append((number, places))
        return [group(place, 0.0, float(place in self.good), tokens=5) for place in places]


FIRST = [group(0, 0.0, 1.0), group(1, 1.0, 1.0), group(2, 0.5, 0.0), group(3, 0.0, 0.0)]


def test_rounds_go_on_until_every_group_has_signal():
    reservoir, order = PromptReservoir(range(12), seed=0), PromptReservoir(range(12), seed=0).take(12, {0, 1, 2, 3})
    draw = Draws({order[1], order[4]})
    kept, metrics = resample(FIRST, draw, reservoir, [1.0, 1.0], rounds=9)
    assert draw.asked == [(1, order[:2]), (2, order[2:3]), (3, order[3:4]), (4, order[4:5])]
    assert kept[0] is FIRST[0] and kept[2] is FIRST[2]
    assert [g.prompt.sample.index for g in kept] == [0, order[1], 2, order[4]]
    assert metrics == pytest.approx(
        {
            "dynamic_sampling/rounds": 4,
            "dynamic_sampling/groups_drawn": 9,
            "dynamic_sampling/groups_replaced": 2,
            "dynamic_sampling/groups_discarded": 5,
            "dynamic_sampling/groups_left_flat": 0,
            "dynamic_sampling/tokens_discarded": 2 * 2 * 2 + 3 * 2 * 5,
            "dynamic_sampling/reward": 1 + (1 + 2 + 0.5 + 2 * 1) / 18,
        }
    )


@pytest.mark.parametrize("rows, rounds", [(12, 2), (7, 9)], ids=["rounds", "prompts"])
def test_what_is_missing_after_the_last_round_is_kept(rows, rounds):
    """No prompt is drawn twice for one generation: of 7 rows nothing is left for a third round."""
    draw = Draws(set())
    kept, metrics = resample(FIRST, draw, PromptReservoir(range(rows), seed=0), [1.0, 1.0], rounds=rounds)
    assert [(number, len(places)) for number, places in draw.asked] == [(1, 2), (2, 2 if rows == 12 else 1)]
    places = [place for _, places in draw.asked for place in places]
    assert len(set(places)) == len(places) == metrics["dynamic_sampling/groups_discarded"]
    assert set(places) <= set(range(4, rows)) and metrics["dynamic_sampling/rounds"] == 2
    assert all(a is b for a, b in zip(kept, FIRST, strict=True))
    assert metrics["dynamic_sampling/groups_left_flat"] == 2


def test_nothing_is_drawn_where_all_groups_have_signal():
    reservoir, draw = PromptReservoir(range(7), seed=0), Draws(set())
    kept, metrics = resample([FIRST[0], FIRST[2]], draw, reservoir, [1.0, 1.0], rounds=9)
    assert len(kept) == 2 and draw.asked == [] and reservoir.position == 0
    assert metrics["dynamic_sampling/rounds"] == metrics["dynamic_sampling/groups_discarded"] == 0


SIGNALS = {
    "equal sums": ([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.0], True),
    "other weights": ([[1.0, 0.0], [0.0, 1.0]], [1.0, 0.5], False),
    "a reward that does not count": ([[1.0, 0.0], [1.0, 1.0]], [1.0, 0.0], True),
    "one that does not apply": ([[1.0, nan], [nan, 1.0]], [1.0, 1.0], True),
    "only one is scored": ([[1.0, nan], [nan, nan]], [1.0, 1.0], True),
    "other weights, none applies to both": ([[1.0, nan], [nan, 1.0]], [1.0, 0.5], False),
}


@pytest.mark.parametrize(("rewards", "weights", "expected"), SIGNALS.values(), ids=SIGNALS.keys())
def test_signal_is_of_the_weighted_sum(rewards, weights, expected):
    assert has_equal_rewards(replace(FIRST[0], rewards=torch.tensor(rewards)), weights) == expected


def test_ranks_agree_on_rounds_and_share_the_reservoir():
    """The second rank has signal everywhere: it joins each round, and its reservoir moves as the first one's does."""
    firsts = [[FIRST[1], FIRST[3]], [FIRST[0], FIRST[2]]]
    order = PromptReservoir(range(12), seed=0).take(12, {0, 1, 2, 3})
    draws, reservoirs = [Draws({order[2]}), Draws(set())], [PromptReservoir(range(12), seed=0) for _ in range(2)]

    def run(ranks: Any) -> Any:
        own = firsts[ranks.rank], draws[ranks.rank], reservoirs[ranks.rank]
        return resample(*own, [1.0, 1.0], rounds=2, rank=ranks.rank, gather=ranks.all_gather_list)

    found = on_ranks(2, run)
    assert draws[0].asked == [(1, order[:2]), (2, order[2:4])] and draws[1].asked == [(1, []), (2, [])]
    assert [g.prompt.sample.index for g in found[0][0]] == [order[2], 3]
    assert [found[rank][1]["dynamic_sampling/rounds"] for rank in range(2)] == [2, 2]
    assert reservoirs[0].position == reservoirs[1].position > 4


# In the trainer


def only_some(prompts: list, completions: list, solution: list, **columns: Any) -> list[float]:
    """Differs within the groups of half of the rows of the data."""
    return [float(i % 3) * (sum(map(ord, text)) % 2) for i, text in enumerate(solution)]


def run_of(model: Any, processor: Any, output: Path, **settings: Any) -> Any:
    digits.write(output / "data", "train", 16, seed=5)
    trainer = trainer_of(model, processor, output, prompts_per_device=4, beta=0.0, **settings)
    trainer.rewards = [get_reward(only_some)]
    trainer.reward_weights = [1.0]
    return trainer


def test_a_run_trains_on_groups_with_signal(model, processor, tmp_path, monkeypatch):
    """The first round is that of a run without; the next ones draw other prompts, from other random numbers."""
    plain = run_of(model, processor, tmp_path / "plain")
    plain.train()
    row = plain.state.log_history[0]
    assert 0 < row["zero_variance_groups"] < 1 and not [name for name in row if "dynamic_sampling" in name]
    trainer = run_of(model, processor, tmp_path / "dynamic", dynamic_sampling=True, dynamic_sampling_max_rounds=8)
    asked, generate = [], trainer.engine.generate

    def spied(prompts: Any, *rest: Any, step: int) -> Any:
        asked.append(([p.sample.index for p in prompts], step))
        return generate(prompts, *rest, step=step)

    monkeypatch.setattr(trainer.engine, "generate", spied)
    trainer.train()
    row = trainer.state.log_history[0]
    assert asked[0] == ([g.prompt.sample.index for g in plain.last_groups], 0)
    assert [step for _, step in asked] == [number << 32 for number in range(len(asked))] and len(asked) > 1
    indices = [index for round_, _ in asked for index in round_]
    assert len(set(indices)) == len(indices)
    assert row["zero_variance_groups"] == row["dynamic_sampling/groups_left_flat"] == 0
    assert row["dynamic_sampling/rounds"] == len(asked) - 1
    assert row["dynamic_sampling/groups_drawn"] == len(indices)
    for one, other in zip(plain.last_groups, trainer.last_groups, strict=True):
        same = [torch.equal(a.token_ids, b.token_ids) for a, b in zip(one.completions, other.completions, strict=True)]
        assert (all(same) and one.prompt.sample.index == other.prompt.sample.index) or has_equal_rewards(one, [1.0])
    kept = sum(len(c.token_ids) for g in trainer.last_groups for c in g.completions)
    assert trainer.engine.stats.tokens == kept + row["dynamic_sampling/tokens_discarded"]


# Resumed

REWARD = """
def some(prompts, completions, completion_ids, solution, **columns):
    return [float(sum(ids) % 7) * (sum(map(ord, text)) % 2) for ids, text in zip(completion_ids, solution)]
"""
RESUMED = {
    "buffer": [],
    "buffer, frozen tower": ["--freeze_vision", "true"],
    "buffer, recompute": ["--old_logprobs", "recompute"],
    "dynamic sampling": ["--dynamic_sampling", "true", "--reward_funcs", "{folder}/mine.py:some"],
    "a reference that follows": [
        *("--sync_ref_model", "true", "--ref_model_sync_steps", "2", "--ref_model_mixup_alpha", "0.5"),
        *("--kl_in_reward", "true"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("more", RESUMED.values(), ids=RESUMED.keys())
def test_a_run_goes_on_bit_equal(more, tmp_path):
    """From checkpoint 2 of 6, which is within the third round of the reservoir, or the second of four updates on the
    first generation."""
    digits.write(tmp_path, "train", 12, seed=3)
    (tmp_path / "mine.py").write_text(REWARD)
    words = [word.format(folder=tmp_path) for word in more] + ["--save_total_limit", "5", "--temperature", "1.5"]
    kept = RESERVOIR if "--dynamic_sampling" in more else REFERENCE if "--sync_ref_model" in more else ROLLOUTS
    if kept != RESERVOIR:
        words += ["--steps_per_generation", "2", "--num_iterations", "2"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert main(command(tmp_path, whole, *words)) == 0
    again.mkdir()
    shutil.copy(whole / "settings.json", again)
    shutil.copytree(whole / "checkpoint-2", again / "checkpoint-2")
    assert (whole / "checkpoint-2" / kept).exists()
    assert kept != ROLLOUTS or not (whole / "checkpoint-4" / kept).exists()
    assert main(command(tmp_path, again, *words)) == 0
    expected, found, before = weights(whole), weights(again), weights(whole, 2)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(not torch.equal(before[name], expected[name]) for name in expected)
    histories = [metrics(run) for run in (whole, again)]
    assert histories[1] == histories[0][2:]
    if kept != ROLLOUTS:  # which hold what was measured too
        last, other = ((run / "checkpoint-6" / kept).read_bytes() for run in (whole, again))
        assert last == other != (whole / "checkpoint-2" / kept).read_bytes()
    if kept == RESERVOIR:
        assert sum(row["dynamic_sampling/groups_replaced"] for row in histories[0]) > 0
