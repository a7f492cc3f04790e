"""`vlmr1 sft` from end to end: metrics, checkpoints, kill and resume, an adapter, evaluation, and GRPO behind it."""

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.answers import STEPS, command, write_rows
from tests.helpers.digit_runs import command as train_command
from tests.helpers.forked import finish
from tests.helpers.plants import At, kill
from tests.helpers.tiny_runs import differences, metrics
from vlmr1.cli import main
from vlmr1.report.progress import read_metrics

LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0.1"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def finished(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    evaluated = ["--val_split_ratio", "0.25", "--eval_steps", "3", "--eval_on_start", "true"]
    assert main(command(rows, output, *evaluated, "--write_report", "true")) == 0
    return output


def test_a_run_learns_and_logs(finished):
    logs = read_metrics(finished)
    assert [line["step"] for line in logs] == list(range(1, STEPS + 1))
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    assert {"grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "num_tokens", "epoch"} <= logs[0].keys()
    assert 0 < logs[0]["mean_token_accuracy"] < 1 and logs[0]["num_tokens"] < logs[1]["num_tokens"]
    assert (
        not (finished / "completions.jsonl").exists()
        and "mean_token_accuracy" in (finished / "training.html").read_text()
    )


def test_held_out_rows_are_evaluated(finished):
    lines = [json.loads(line) for line in (finished / "eval.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rows"]) for line in lines] == [(0, 2), (3, 2), (6, 2)]
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"] and 0 < lines[0]["eval/mean_token_accuracy"] < 1


def test_grpo_goes_on_from_its_model(finished, data, tmp_path):
    start = ["--model_name_or_path", str(finished), "--max_steps", "1", "--write_report", "false"]
    assert main(train_command(data, tmp_path, *start)) == 0
    (line,) = read_metrics(tmp_path)
    assert line["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], LORA], ids=["all weights", "lora"])
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(more, rows, tmp_path):
    whole, output = tmp_path / "whole", tmp_path / "out"
    for folder, plant, status in (
        (whole, None, 0),
        (output, At("os.rename", "out/checkpoint-4/", kill, argument=1), -signal.SIGKILL),
        (output, None, 0),
    ):
        found, text = finish(command(rows, folder, *more), tmp_path / "log", plant)
        assert found == status, text
    assert f"continuing from {output / 'checkpoint-2'}" in text
    assert metrics(whole) == metrics(output) and len(metrics(whole)) == STEPS
    one, two = (folder / f"checkpoint-{STEPS}" for folder in (whole, output))
    if not more:
        assert differences(one, two) == [] != differences(one, whole / "checkpoint-4")
        return
    one, two, before = (load_file(path / "adapter_model.safetensors") for path in (one, two, whole / "checkpoint-4"))
    assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], before[name]) for name in one)


REFUSED = {  # words of the command, and of the message
    "several at once": (
        ["--beta", "0.1", "--lr", "1", "--max_length", "1", "--response_column", ""],
        ["'beta'", "only `vlmr1 train` reads it", "'lr'", "max_length is 1", "response_column is empty"],
    ),
    "template by rewards": (["--question_template", "auto"], ["question_template=auto"]),
    "recipe of train": (["--recipe", "rec-3b"], ["unknown recipe 'rec-3b'", "rec-3b-sft"]),
    "prompt too long": (["--max_length", "40"], ["train.jsonl:", "max_length is 40"]),
    "best without evaluation": (["--load_best_model_at_end", "true"], ["load_best_model_at_end needs eval_steps"]),
    "best of rewards": (
        ["--load_best_model_at_end", "true", "--eval_steps", "2", "--metric_for_best_model", "rec/iou"],
        ["metric_for_best_model is 'rec/iou': known are loss, mean_token_accuracy, entropy"],
    ),
}


@pytest.mark.parametrize(("more", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_on_the_command_line(more, words, rows, tmp_path, capsys):
    assert main(command(rows, tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert [word for word in words if word not in said] == [], said


def test_other_trainers_do_not_read_its_settings(data, tmp_path, capsys):
    assert main(train_command(data, tmp_path, "--max_length", "64")) == 2
    assert "'max_length' on the command line: only `vlmr1 sft` reads it" in capsys.readouterr().err


def test_help(capsys):
    assert main(["sft", "--help"]) == 0
    text = capsys.readouterr().out
    assert "response_column" in text and not any(name in text for name in ("num_generations", "beta =", "reward_funcs"))
    assert main(["sft", "--help", "max_length"]) == 0
    assert "1024" in capsys.readouterr().out
