"""Rewards that fail and updates that are not finite: one message that names the place, nothing lost."""

import logging

import pytest
import torch

from tests.helpers.digit_runs import command
from tests.helpers.trainers import trainer_of
from vlmr1.cli import main
from vlmr1.errors import DivergedError
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.lifecycle.checkpoint import last_complete

MINE = """
from vlmr1.errors import DataError
calls = []
def mine(prompts, completions, **columns):
    calls.append(1)
    if len(calls) > 2:
        {}
    return [float(len(calls))] * len(completions)
"""


@pytest.mark.parametrize(
    "body", ["raise DataError('gone')", "return [float('nan')] * len(completions)"], ids=["raises", "NaN"]
)
def test_reward_that_fails_names_the_row_and_keeps_the_checkpoint(body, data, tmp_path, capsys):
    """The reward works for two steps and fails in the third."""
    (tmp_path / "mine.py").write_text(MINE.format(body))
    more = ["--reward_funcs", f"{tmp_path / 'mine.py'}:mine", "--num_generations", "2", "--save_steps", "1"]
    assert main(command(data, tmp_path / "out", *more, "--max_completion_length", "6")) == 2
    message = capsys.readouterr().err
    assert "mine" in message
    assert f"{data / 'train.jsonl'}:" in message
    assert last_complete(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"


def poison(trainer: GRPOTrainer, steps: set[int]) -> None:
    """Make the loss NaN at these steps."""
    clean = trainer.policy.loss

    def poisoned(pack, objective):
        loss, metrics = clean(pack, objective)
        return (loss * float("nan") if trainer.state.global_step in steps else loss), metrics

    trainer.policy.loss = poisoned


def test_update_that_is_not_finite_is_skipped_and_counted(tmp_path, model, processor, caplog):
    trainer = trainer_of(model, processor, tmp_path, max_steps=3)
    poison(trainer, {1})
    states, step = [], trainer._get_grad_norm

    def watched(*args, **kwargs):
        norm = step(*args, **kwargs)
        states.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        return norm

    trainer._get_grad_norm = watched
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "step 2: loss nan" in caplog.text
    final = dict(trainer.model.named_parameters())
    assert all(torch.equal(states[1][name], states[2][name]) for name in final)  # step 2 changed nothing
    assert any(not torch.equal(states[0][name], states[1][name]) for name in final)  # step 1 did
    assert any(not torch.equal(states[2][name], final[name]) for name in final)  # and so did step 3
    assert trainer.skipped == 1


@pytest.mark.slow
def test_run_stops_after_five_in_a_row(tmp_path, model, processor):
    trainer = trainer_of(model, processor, tmp_path, max_steps=20, save_strategy="steps", save_steps=2)
    poison(trainer, set(range(3, 20)))
    with pytest.raises(DivergedError, match="stopped at step 8: 5 updates in a row"):
        trainer.train()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-6"
