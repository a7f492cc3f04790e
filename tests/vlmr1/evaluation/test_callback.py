"""Evaluation during training: what it reports, when, and that training does not notice it."""

import json
import random
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from tests.helpers.evaluations import evaluated
from vlmr1.config import GRPOConfig
from vlmr1.data.samples import load_samples
from vlmr1.errors import DataError, OutputError, SettingError
from vlmr1.evaluation.callback import EVALUATIONS, EvaluationCallback
from vlmr1.evaluation.during_training import evaluate_during_training
from vlmr1.evaluation.evaluate import evaluate
from vlmr1.grpo.trainer import GRPOTrainer
from vlmr1.lifecycle.signals import StopSignals
from vlmr1.models import load_model
from vlmr1.report.progress import Progress, read_metrics
from vlmr1.tiny import CHECKPOINT, digits

ROWS = 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    digits.write(folder, "train", 6, seed=3)
    digits.write(folder, "held_out", ROWS, seed=3)
    return folder


def settings_of(data: Path, output: Path, **more: Any) -> GRPOConfig:
    given = {"num_generations": 2, "prompts_per_device": 2, "max_completion_length": 32, "max_steps": 2}
    given |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-3}
    if more.get("eval_steps") or more.get("eval_on_start"):
        given |= {"eval_data_file_paths": [str(data / "held_out.jsonl")], "eval_image_folders": [str(data / "images")]}
    return GRPOConfig(output_dir=str(output), **(given | more))


def trainer_of(data: Path, output: Path, processor: Any, **more: Any) -> GRPOTrainer:
    """As `vlmr1 train` puts it together."""
    output.mkdir(exist_ok=True)
    config = settings_of(data, output, **more)
    samples = load_samples([data / "train.jsonl"], [data / "images"], question="{question}", check_images=False)
    progress = Progress(output, console=False)
    trainer = GRPOTrainer(load_model(CHECKPOINT), config, samples, processor, callbacks=[progress])
    progress.trainer = trainer
    rows = evaluated(config, processor)
    if rows is not None:
        trainer.add_callback(EvaluationCallback(trainer, rows))
    return trainer


def evaluations(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / EVALUATIONS).read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory, processor: Any) -> dict[str, GRPOTrainer]:
    """Two updates without evaluation, and with one before and after each."""
    trainers = {}
    for name, more in {"without": {}, "with": {"eval_steps": 1, "eval_on_start": True}}.items():
        trainers[name] = trainer_of(data, tmp_path_factory.mktemp(name) / "out", processor, **more)
        trainers[name].train()
    return trainers


def test_training_does_not_notice(runs):
    weights = [runs[name].model.state_dict() for name in ("without", "with")]
    before = load_model(CHECKPOINT).state_dict()
    assert any(not torch.equal(weights[0][name], value) for name, value in before.items())
    assert [name for name in weights[0] if not torch.equal(weights[0][name], weights[1][name])] == []
    logs = [read_metrics(Path(runs[name].args.output_dir)) for name in ("without", "with")]
    keep = ("step", "loss", "reward", "kl", "grad_norm", "completion_length", "rewards/accuracy/mean")
    assert [[row[key] for key in keep] for row in logs[0]] == [[row[key] for key in keep] for row in logs[1]]
    assert [row["step"] for row in logs[1]] == [1, 2]


def test_a_line_a_time(runs, data, processor):
    found = evaluations(Path(runs["with"].args.output_dir))
    assert [(line["step"], line["rows"]) for line in found] == [(0, ROWS), (1, ROWS), (2, ROWS)]
    samples = runs["with"].callback_handler.callbacks[-1].samples
    for line, model in ((found[0], load_model(CHECKPOINT)), (found[2], runs["with"].model)):
        expected = evaluate(model, processor, samples, max_completion_length=32, batch_size=4).result
        assert line["eval/rec/mean_iou"] == pytest.approx(expected.mean_iou)
        assert line["eval/rewards/accuracy/mean"] == pytest.approx(expected.mean_iou)  # of float32 scores
        assert line["eval/rec/acc@0.5"] == expected.accuracy
        assert line["eval/rewards/format/mean"] == pytest.approx(expected.format_share)
    assert found[0]["eval/rec/mean_iou"] != found[2]["eval/rec/mean_iou"]


def test_trackers_get_it(runs):
    logged = [log for log in runs["with"].state.log_history if "eval_rewards/accuracy/mean" in log]
    assert [log["step"] for log in logged] == [0, 1, 2]
    assert not any("kl" in log for log in logged)  # what was gathered of the steps is in their own logs
    lines = evaluations(Path(runs["with"].args.output_dir))
    assert [log["eval_rec/mean_iou"] for log in logged] == [line["eval/rec/mean_iou"] for line in lines]


def test_random_states_and_mode_are_left_alone(runs):
    trainer = runs["with"]
    trainer.model.train()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    statistics, trainer.engine.state = trainer.engine.stats, Mock()
    evaluate_during_training(trainer, trainer.callback_handler.callbacks[-1].samples[:1])
    assert trainer.engine.state is None  # memory that rollouts keep is free for the evaluation's own engine
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert trainer.model.training and trainer.engine.stats is statistics


def test_a_resumed_run_drops_later_lines(data, tmp_path, processor, monkeypatch):
    trainer = trainer_of(data, tmp_path / "out", processor, eval_steps=2)
    path = tmp_path / "out" / EVALUATIONS
    path.write_text('{"step": 0}\n{"step": 2}\n{"step": 4}\n{"step": 6, "ro')
    callback = trainer.callback_handler.callbacks[-1]
    monkeypatch.setattr("vlmr1.evaluation.callback.evaluate_during_training", lambda *_: {"eval/x": 1.0})
    trainer.state.global_step = 2
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    for trainer.state.global_step in (3, 4):
        callback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert evaluations(tmp_path / "out") == [{"step": 0}, {"step": 2}, {"step": 4, "rows": ROWS, "eval/x": 1.0}]


def written(data: Path, path: Path, solutions: list[str | None], **columns: str) -> list[str]:
    """The first rows of the data with other solutions and more columns."""
    rows = [json.loads(line) for line in (data / "held_out.jsonl").read_text().splitlines()]
    for row, solution in zip(rows, solutions, strict=False):
        row["conversations"][1]["value"] = solution or row["conversations"][1]["value"]
    path.write_text("".join(json.dumps(row | columns) + "\n" for row in rows[: len(solutions)]))
    return [str(path)]


def test_detection_metrics(data, tmp_path, processor):
    """The model answers one box with its label: of one image it is right, of the other it is of a label too many."""
    paths = written(data, tmp_path / "ovd.jsonl", [None, "None"], accu_reward_method="od_ap")
    template = {"question_template": "rec"}  # with which the model was trained
    trainer = trainer_of(data, tmp_path / "out", processor, eval_steps=1, eval_data_file_paths=paths, **template)
    values = evaluate_during_training(trainer, trainer.callback_handler.callbacks[-1].samples)
    assert values["eval/rewards/accuracy/mean"] > 0
    assert {name for name in values if "/ovd/" in name} == {"eval/ovd/ap", "eval/ovd/ap50", "eval/ovd/nms_ap"}
    assert "eval/rec/mean_iou" not in values
    assert values["eval/ovd/ap"] == values["eval/ovd/nms_ap"] == pytest.approx(values["eval/rewards/accuracy/mean"] * 2)


def test_rows_are_checked_and_limited(data, tmp_path, processor):
    config = settings_of(data, tmp_path, eval_steps=1, eval_limit=2)
    samples = evaluated(config, processor)
    assert samples is not None and [sample.index for sample in samples] == [0, 1]
    (tmp_path / "bad.jsonl").write_text((data / "held_out.jsonl").read_text().replace("bbox_2d", "box"))
    with pytest.raises(DataError, match=r"bad\.jsonl:1: the solution has no box"):
        bad = settings_of(data, tmp_path, eval_steps=1, eval_data_file_paths=[str(tmp_path / "bad.jsonl")])
        evaluated(bad, processor)
    assert evaluated(settings_of(data, tmp_path), processor) is None
    validation = samples[:1]
    without = settings_of(data, tmp_path, eval_steps=1, eval_data_file_paths=[], eval_image_folders=[])
    assert evaluated(without, processor, validation) == validation
    with pytest.raises(SettingError, match="eval_steps needs data to evaluate on: set eval_data_file_paths"):
        evaluated(without, processor)


def test_a_solution_that_only_the_published_code_reads(data, tmp_path, processor):
    """A box without area; there are no box metrics of such rows."""
    paths = written(data, tmp_path / "rows.jsonl", ["<answer>[30, 40, 1, 2]</answer>"] * 2)
    settings = {"eval_steps": 1, "reward_mode": "vlm_r1", "eval_data_file_paths": paths}
    trainer = trainer_of(data, tmp_path / "out", processor, **settings)
    values = evaluate_during_training(trainer, trainer.callback_handler.callbacks[-1].samples)
    assert values is not None and "eval/rewards/accuracy/mean" in values
    assert [name for name in values if "/rec/" in name] == []


@pytest.fixture
def callback(data, tmp_path, processor, monkeypatch) -> Any:
    """One of a run that evaluates every second step; `calls` are the steps at which it did."""
    trainer = trainer_of(data, tmp_path / "out", processor, eval_steps=2)
    found: Any = trainer.callback_handler.callbacks[-1]
    found.calls = []

    def evaluated(trainer: Any, samples: Any, decoder: Any, stopped: Any) -> dict[str, float] | None:
        found.calls.append(trainer.state.global_step)
        return None if stopped() else {"eval/x": 1.0}

    monkeypatch.setattr("vlmr1.evaluation.callback.evaluate_during_training", evaluated)
    trainer.state.max_steps = 6
    return found


def at(callback: Any, step: int, event: str = "on_step_end") -> Any:
    trainer = callback.trainer
    trainer.state.global_step = step
    getattr(callback, event)(trainer.args, trainer.state, trainer.control)
    return trainer.control


def test_a_run_that_stops_does_not_evaluate_and_makes_up_for_it(callback, tmp_path):
    callback.trainer.control.should_training_stop = True
    at(callback, 4)
    assert callback.calls == []
    at(callback, 6)  # where the library itself stops the training
    assert callback.calls == [6]
    (tmp_path / "out" / EVALUATIONS).unlink()
    for _ in range(2):
        at(callback, 4, "on_train_begin")
        assert callback.calls == [6, 4]  # once
    at(callback, 5, "on_train_begin")
    assert callback.calls == [6, 4]
    assert [line["step"] for line in evaluations(tmp_path / "out")] == [4]


def test_a_signal_ends_an_evaluation(callback, tmp_path):
    callback.stop = StopSignals()
    assert not at(callback, 2).should_training_stop and [line["step"] for line in evaluations(tmp_path / "out")] == [2]
    callback.stop.caught = 15
    control = at(callback, 4)
    assert control.should_training_stop and control.should_save
    assert [line["step"] for line in evaluations(tmp_path / "out")] == [2]


def test_it_is_asked_before_each_batch(runs):
    trainer, asked = runs["with"], []
    samples = trainer.callback_handler.callbacks[-1].samples
    stopped = lambda: bool(asked.append(1)) or len(asked) == 2  # noqa: E731
    assert len(samples) > 4 and evaluate_during_training(trainer, samples, stopped=stopped) is None
    assert len(asked) == 2


def test_a_full_disk_and_a_closed_terminal(callback, tmp_path, monkeypatch):
    callback.trainer.args.disable_tqdm = False
    monkeypatch.setattr("vlmr1.evaluation.callback.tqdm.write", Mock(side_effect=BrokenPipeError))
    at(callback, 2)
    path = tmp_path / "out" / EVALUATIONS
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"eval\.jsonl cannot be written to .*: No space left on device"):
        at(callback, 4)
