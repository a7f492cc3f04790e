"""One generation serves several updates: which rows, in which order, with which log-probs, and after a resume."""

from typing import Any

import pytest
from torch.utils.data import SequentialSampler

from tests.helpers.trainers import shift, trainer_of
from vlmr1.distributed.balance import parts_of
from vlmr1.grpo.buffer import Buffer, BufferSampler, Minibatch

SAMPLES = {
    "plain": (4, {"prompts": 2, "parts": 1, "iterations": 1}, [[0, 1], [2, 3]]),
    "iterations": (3, {"prompts": 2, "parts": 1, "iterations": 3}, [[0, 1], [], [], [2], [], []]),
    "parts": (7, {"prompts": 2, "parts": 2, "iterations": 1}, [[0, 1, 2, 3], [], [4, 5, 6], []]),
    "both": (4, {"prompts": 2, "parts": 2, "iterations": 2}, [[0, 1, 2, 3], [], [], []]),
    "too few for every update": (5, {"prompts": 2, "parts": 2, "iterations": 1}, [[0, 1, 2, 3], []]),
    "drop_last": (7, {"prompts": 2, "parts": 2, "iterations": 1, "drop_last": True}, [[0, 1, 2, 3], []]),
}


@pytest.mark.parametrize(("rows", "settings", "expected"), SAMPLES.values(), ids=SAMPLES.keys())
def test_sampler(rows, settings, expected):
    sampler = BufferSampler(SequentialSampler(range(rows)), **{"drop_last": False} | settings)
    assert list(sampler) == expected and len(sampler) == len(expected)


def test_minibatches_are_taken_once_an_iteration():
    minibatches = [Minibatch([], {"number": float(i)}) for i in range(3)]
    buffer = Buffer(iterations=2)
    assert buffer.spent
    buffer.fill(minibatches)
    assert [buffer.take().metrics["number"] for _ in range(5)] == [0, 1, 2, 0, 1] and not buffer.spent
    assert buffer.take().metrics["number"] == 2 and buffer.spent


def test_parts_of():
    assert parts_of(list("abcde"), 2) == [["a", "b", "c"], ["d", "e"]]  # type: ignore[arg-type]
    assert parts_of(list("abc"), 3) == [["a"], ["b"], ["c"]]  # type: ignore[arg-type]


def logged(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def test_one_generation_serves_its_updates(model, processor, tmp_path, monkeypatch):
    """Two prompts an update, two updates an iteration, two iterations: one generation of four prompts."""
    settings = {"steps_per_generation": 2, "max_steps": 5, "temperature": 3.0, "learning_rate": 1e-4}
    trainer = trainer_of(model, processor, tmp_path, num_iterations=2, **settings)
    drawn, trained = [], []
    generate, backward = trainer.engine.generate, trainer.backward
    monkeypatch.setattr(trainer.engine, "generate", lambda p, *a, **k: drawn.append(p) or generate(p, *a, **k))
    monkeypatch.setattr(trainer, "backward", lambda m, groups: trained.append(groups) or backward(m, groups))
    rows = logged(trainer)
    assert [len(prompts) for prompts in drawn] == [4, 4]
    assert [[g.prompt for g in groups] for groups in trained[:2]] == [drawn[0][:2], drawn[0][2:]]
    assert trained[2] is trained[0] and trained[3] is trained[1] and trained[4][0].prompt is drawn[1][0]
    assert rows[0]["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert all(row["ratio_max"] > 1 + 1e-3 for row in rows[1:4])  # the policy has moved, what it is compared to has not
    assert rows[4]["ratio_max"] == pytest.approx(1, abs=1e-4)
    for name in ("rollout/tokens_per_second", "rollout/logp_difference", "seconds/rollout"):
        assert [name in row for row in rows] == [True, False, False, False, True], name


def test_recomputed_old_logprobs_are_of_the_policy_before_the_first_update(model, processor, tmp_path):
    """For both parts, although the second is trained on after the first; the engine's are wrong here."""
    settings = {"steps_per_generation": 2, "max_steps": 2, "learning_rate": 1e-4, "temperature": 3.0}
    trainer = trainer_of(model, processor, tmp_path, old_logprobs="recompute", **settings)
    shift(trainer, 1.0)
    first, second = logged(trainer)
    assert first["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert 1 + 1e-3 < second["ratio_max"] < 1.5
    assert first["seconds/old"] > 0 and "seconds/old" not in second
