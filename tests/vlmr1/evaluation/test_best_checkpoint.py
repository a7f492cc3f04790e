"""The best checkpoint by `metric_for_best_model`: which one it is, that it is kept, and what a run ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from tests.helpers.digit_runs import command
from vlmr1.cli import main
from vlmr1.evaluation import callback
from vlmr1.models import load_model
from vlmr1.report.progress import read_lines
from vlmr1.tiny import digits

VALUES = {1: 0.2, 2: 0.9, 3: 0.5, 4: 0.7}  # of the evaluation at a step


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Four updates with an evaluation of these values each; returns the trainer."""
    digits.write(tmp_path / "data", "train", 4, seed=1)
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def turns(completions, **columns):\n    return [float(i % 2) for i in range(len(completions))]\n"
    )
    trainers: list[Any] = []
    original = callback.evaluate_during_training

    def evaluate(trainer: Any, *rest: Any) -> Any:
        trainers.append(trainer)
        return (original(trainer, *rest) or {}) | {"eval/reward": VALUES.get(trainer.state.global_step, 0.0)}

    monkeypatch.setattr(callback, "evaluate_during_training", evaluate)

    def train(**more: Any) -> Any:
        settings = {"max_steps": 4, "save_steps": 1, "eval_steps": 1, "eval_limit": 1, "num_generations": 2}
        settings |= {"eval_data_file_paths": tmp_path / "data" / "train.jsonl", "max_completion_length": 6}
        settings |= {"eval_image_folders": tmp_path / "data" / "images", "load_best_model_at_end": "true"}
        settings |= {"reward_funcs": f"{reward}:turns", "save_total_limit": 9} | more
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        assert main(command(tmp_path / "data", tmp_path / "out", "--learning_rate", "1e-2", *words)) == 0
        return trainers[-1]

    return train


def step_of(trainer: Any) -> int:
    return int(trainer.state.best_model_checkpoint.rpartition("-")[2])


def saved(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in (folder / "out").glob("checkpoint-*"))


CASES = {  # settings, best step, steps whose checkpoint is left
    "largest": ({}, 2, [1, 2, 3, 4]),
    "smallest": ({"greater_is_better": "false"}, 1, [1, 2, 3, 4]),
    "kept beside the last": ({"save_total_limit": 1}, 2, [2, 4]),
    "kept beside two": ({"save_total_limit": 2}, 2, [2, 4]),
    "of what is saved": ({"save_steps": 3}, 4, [3, 4]),
    "saved where better": ({"save_strategy": "best", "metric_for_best_model": "eval_reward"}, 2, [1, 2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("settings, best, left", CASES.values(), ids=CASES)
def test_a_run_ends_with_the_best(settings, best, left, train, tmp_path, capsys):
    trainer = train(**settings)
    assert (step_of(trainer), saved(tmp_path)) == (best, left)
    weights = [load_model(tmp_path / "out" / f"checkpoint-{step}").state_dict() for step in (best, left[-1])]
    trained = trainer.model.state_dict()
    assert all(torch.equal(trained[name], value) for name, value in weights[0].items())
    assert best == left[-1] or any(not torch.equal(trained[name], value) for name, value in weights[1].items())
    assert f"checkpoint-{best}: " in capsys.readouterr().out.partition("best ")[2]


@pytest.mark.slow
def test_a_run_that_continues_knows_the_best(train, tmp_path):
    train(max_steps=4)
    for step in (3, 4):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        folder.rename(tmp_path / folder.name)
    trainer = train(max_steps=4)  # continues from checkpoint-2
    assert step_of(trainer) == 2
    state = TrainerState.load_from_json(str(tmp_path / "out" / "checkpoint-4" / "trainer_state.json"))
    assert (state.best_metric, Path(state.best_model_checkpoint).name) == (0.9, "checkpoint-2")
    lines = read_lines(tmp_path / "out" / "eval.jsonl")
    assert [(line["step"], line["eval/reward"]) for line in lines] == list(VALUES.items())


@pytest.mark.slow
def test_a_metric_that_these_rows_do_not_have_is_refused(train, tmp_path, capsys):
    with pytest.raises(AssertionError):
        train(metric_for_best_model="ovd/map")
    message = capsys.readouterr().err
    assert "metric_for_best_model" in message and "eval/truncated" in message and "Traceback" not in message
