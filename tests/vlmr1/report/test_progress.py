"""The line of a step, and the warning that rewards are flat."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.helpers.trainers import trainer_of
from vlmr1.data.box_coordinates import BoxCoordinates
from vlmr1.grpo.no_signal_warning import STEPS, NoSignalWarning
from vlmr1.report.console import step_line
from vlmr1.report.progress import Progress
from vlmr1.rewards import get_reward
from vlmr1.rewards.settings import RewardSettings
from vlmr1.types import Prompt, Sample

LOGS = {
    "rewards/accuracy/mean": 0.5123,
    "rewards/accuracy/std": 0.214,
    "rewards/format/mean": 1.0,
    "rewards/format/std": 0.0,
    "kl": 0.01234,
    "entropy": 1.456,
    "clip_low": 0.001,
    "clip_high": 0.0234,
    "grad_norm": 1.5,
    "completion_length": 45.1,
    "zero_variance_groups": 0.25,
    "truncated": 0.03,
    "parse_failures": 0.05,
    "tokens_per_second": 1234.4,
    "memory/peak_mib": 1536.0,
    "seconds/rollout": 2.0,
    "seconds/update": 1.214,
}


@pytest.mark.parametrize("rewards", [4, 12])
def test_a_line_is_never_wider(rewards):
    """Step, first rewards and seconds stay longest."""
    more = {f"rewards/a_reward_of_mine_{i}/{kind}": 0.123 for i in range(rewards) for kind in ("mean", "std")}
    line = step_line(LOGS | more, 123456)
    assert len(line) <= 176 and "\n" not in line
    assert line.startswith("step 123456  accuracy 0.512±0.21") and line.endswith("3.21 s")
    assert "t/s" not in line
    long = {f"rewards/{'x' * 200}/{kind}": 0.0 for kind in ("mean", "std")}
    assert step_line(long | LOGS, 1).startswith("step 1")


def test_what_a_run_logs_makes_a_line(model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path)
    trainer.train()
    line = step_line(trainer.state.log_history[0], 1)
    for word in ("position 1.000±1.00", "even 5.000±", "kl 0.0000", "ent ", "clip 0.0/0.0%", "t/s", "GiB"):
        assert word in line
    assert len(line) <= 176


# Flat rewards

ZERO = {"rewards/accuracy/mean": 0.0, "rewards/format/mean": 0.0}
FINE = {"zero_variance_groups": 0.5, "truncated": 0.0, "entropy": 1.0, **ZERO}
FLAT = FINE | {"zero_variance_groups": 1.0}
REASONS = {
    "truncated": (FLAT | {"truncated": 0.95, "parse_failures": 0.95}, "95% of the completions end at the length limit"),
    "no answer": (FLAT | {"parse_failures": 0.97}, "97% of the completions have no closed <answer>"),
    "no answer, a lucky group": (FINE | {"parse_failures": 0.97}, "97% of the completions have no closed <answer>"),
    "no box": (FLAT | {"parse_failures": 0.1, "box_failures": 0.92}, "92% of the answers hold nothing"),
    "late": (FLAT | {"reward_timeouts": 6.0}, "6 scores a step were not done in time"),
    "the same completions": (FLAT | {"entropy": 0.001}, "the completions of a group are the same"),
    "all wrong": (FLAT, "answers are read and all score 0 (accuracy 0, format 0)"),
    "all equal": (FLAT | {"rewards/format/mean": 1.0}, "the same score (accuracy 0, format 1)"),
}


def watch(logs: list[dict[str, float]]) -> NoSignalWarning:
    watcher = NoSignalWarning()
    for step, each in enumerate(logs, 1):
        watcher.on_log(None, SimpleNamespace(global_step=step), None, logs=each)
    return watcher


@pytest.mark.parametrize(("logs", "said"), REASONS.values(), ids=REASONS.keys())
def test_flat_rewards_are_warned_of_once_with_the_reason(logs, said, caplog):
    watch([logs] * (STEPS - 1))
    assert caplog.text == ""
    watch([logs] * 3 * STEPS)
    assert caplog.text.count("no learning signal in the last 10 logged steps (up to step 10)") == 1
    assert said in caplog.text


TEACHES = {
    "a group that differs": {},
    "some reward": {"parse_failures": 0.97, "rewards/format/mean": 0.1},
    "answers are read": {"parse_failures": 0.9},
}


@pytest.mark.parametrize("between", TEACHES.values(), ids=TEACHES.keys())
def test_a_step_that_teaches_starts_the_count_anew(between, caplog):
    watch(([FLAT] * (STEPS - 1) + [FINE | between]) * 3)
    assert caplog.text == ""
    watch([FLAT] * (STEPS - 1) + [{"train_runtime": 1.0}] + [FLAT])  # the log at the end of a run counts as nothing
    assert "up to step 11" in caplog.text


# The factor that a logged completion's boxes are drawn with: that with which a reward has scored them, or none


SCALES = {
    "accuracy": (["format", "accuracy"], "iou", None, (0.2, 0.1)),
    "accuracy in words": (["accuracy"], "mcq", None, None),
    "the row's own method": (["accuracy"], "mcq", "odLength", (0.2, 0.1)),
    "iou": (["iou"], "mcq", None, (0.2, 0.1)),
    "a point": (["point_in_box"], "mcq", None, (0.2, 0.1)),
    "not converted": (["iou_internvl"], "iou", None, None),
    "not converted, then converted": (["iou_internvl", "accuracy"], "iou", None, (0.2, 0.1)),
}


@pytest.mark.parametrize("rewards, method, own, expected", SCALES.values(), ids=SCALES)
def test_box_scale(rewards, method, own, expected, tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    settings = RewardSettings(accu_reward_method=method, boxes=BoxCoordinates("thousand"))
    progress = Progress(Path(tmp_path), console=False)
    progress.trainer = SimpleNamespace(rewards=[get_reward(name, settings) for name in rewards])
    columns = {} if own is None else {"accu_reward_method": own}
    sample = Sample([], (tmp_path / "a.png",), "[1, 2, 3, 4]", "data.jsonl:1", 0, columns)
    nothing = torch.zeros(0, dtype=torch.long)
    assert progress._box_scale(Prompt(sample, nothing, nothing[None])) == expected
