"""The page of several runs, read back: groups of seeds, intervals, settings that differ, final and best values."""

import io
import json
import math
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from tests.helpers.pages import Page, Recorder
from vlmr1.cli import main
from vlmr1.report.comparison import draw
from vlmr1.report.run_groups import different_settings, estimate, grouped, read_runs, t_quantile

SETTINGS = {"seed": 0, "learning_rate": 1e-4, "beta": 0.04, "max_steps": 5, "output_dir": "a", "logging_steps": 1}


def write(run: Path, rewards: Sequence[float], evaluations: Sequence[float] = (), **changes: Any) -> Path:
    """A run that logged these rewards from step 1 on, and evaluated every second step."""
    run.mkdir(parents=True)
    rows = [{"step": i, "reward": reward, "kl": 0.1 * i} for i, reward in enumerate(rewards, 1)]
    found = [{"step": 2 * i, "eval/rec/mean_iou": value} for i, value in enumerate(evaluations, 1)]
    for name, lines in (("metrics.jsonl", rows), ("eval.jsonl", found)):
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if changes != {"settings": None}:
        (run / "settings.json").write_text(json.dumps(SETTINGS | {"output_dir": str(run)} | changes))
    return run


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Three seeds, of which one goes on, and a run with another beta."""
    return [
        write(tmp_path / "a0", [0.0, 1.0, 2.0, 3.0, 4.0], [0.5, 0.9]),
        write(tmp_path / "a1", [1.0, 2.0, 3.0, 4.0, 8.0], [0.6, 0.7], seed=1, logging_steps=5),
        write(tmp_path / "a2", [2.0, 3.0, 7.0], [0.7], seed=2),
        write(tmp_path / "b0", [1.0, 1.0, 5.0, 1.0, 1.0], [0.1, 0.2], beta=0.0),
    ]


def test_intervals_against_hand_and_scipy():
    """For 1, 2 and 6: mean 3, s^2 = (4 + 1 + 9) / 2 = 7, half = 4.302653 * sqrt(7 / 3) = 6.572411."""
    found = estimate([1.0, 2.0, 6.0])
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3 - 6.572411, 3 + 6.572411), abs=1e-5)
    assert math.isnan(estimate([1.0]).low) and estimate([1.0]).mean == 1.0
    for freedom in (*range(1, 31), 100, 10_000):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-4)


def test_seeds_are_a_group_with_a_mean_over_the_steps_of_all(runs):
    group, other = grouped(read_runs(runs))
    assert [run.name for run in group.runs] == ["a0", "a1", "a2"] and other.name == "b0"
    curve = group.curve("reward")
    np.testing.assert_array_equal(curve.steps, [1, 2, 3])
    np.testing.assert_allclose(curve.mean, [1, 2, 4])
    half = 4.30265273 * np.sqrt(np.array([1, 1, 7]) / 3)  # variances of (0, 1, 2), (1, 2, 3) and (2, 3, 7)
    np.testing.assert_allclose(curve.high - curve.mean, half, rtol=1e-6)
    np.testing.assert_allclose(curve.mean - curve.low, half, rtol=1e-6)
    assert group.final("reward").mean == pytest.approx((4 + 8 + 7) / 3) and group.best("reward") == (4.0, 3)
    assert group.best("eval/rec/mean_iou") == (pytest.approx(0.6), 2) and other.best("reward") == (5.0, 3)
    assert np.isnan(other.curve("reward").low).all() and group.curve("entropy").steps.size == 0


def test_curves_are_running_means_over_a_tenth(tmp_path):
    (run,) = read_runs([write(tmp_path / "a", [float(i % 2) for i in range(40)])])
    np.testing.assert_allclose(run.smooth("reward")[1][:5], [0, 0.5, 1 / 3, 0.5, 0.5])
    assert run.final("reward") == 0.5


NOT_GROUPED = {
    "another setting": [{}, {"seed": 1, "beta": 0.1}],
    "the seed of another": [{}, {}],
    "no settings": [{"settings": None}, {"settings": None}],
}


@pytest.mark.parametrize("changes", NOT_GROUPED.values(), ids=NOT_GROUPED)
def test_runs_that_are_no_group(changes, tmp_path):
    found = grouped(read_runs([write(tmp_path / str(i), [1.0], **each) for i, each in enumerate(changes)]))
    assert [len(group.runs) for group in found] == [1, 1]


def test_settings_that_differ_exactly(runs, tmp_path):
    seeds = {"seed": [0, 1, 2, 0], "logging_steps": [1, 5, 1, 1]}
    assert different_settings(read_runs(runs)) == {**seeds, "beta": [0.04, 0.04, 0.04, 0.0]}
    assert different_settings(read_runs(runs[:1])) == {}
    older = write(tmp_path / "older", [1.0])
    (older / "settings.json").write_text('{"seed": 0, "beta": 0.04}')
    assert different_settings(read_runs([older, runs[3]])) == {"beta": [0.04, 0.0]}  # the others are not known


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["one", "two"], ["one", "two"]),
        (["x/run", "y/run", "z"], ["x/run", "y/run", "z"]),
        (["x", "x/y"], ["x", "x/y"]),
    ],
)
def test_runs_are_named_below_the_directory_that_they_share(folders, names, tmp_path):
    made = [write(tmp_path / "runs" / folder, [1.0]) for folder in folders]
    assert [run.name for run in read_runs(made)] == names


def test_the_page(runs, tmp_path, caplog):
    out = tmp_path / "page.html"
    assert main(["report", *map(str, [*runs, runs[0]]), "--output", str(out)]) == 0
    text = out.read_text()
    assert f"{runs[0]} is given twice: it is shown once" in caplog.text
    assert "http://" not in text and "https://" not in text and "<script" not in text and "url(" not in text
    page = Page(text)
    (image,) = page.of("img")
    assert Image.open(io.BytesIO(b64decode(str(image["src"]).partition(",")[2]))).width > 1000
    words = [word for word in page.words if word.strip()]
    assert words[words.index("a2") + 1] == "3 of 5: not finished" and words[words.index("a0") + 1] == "5 of 5"
    values = words[words.index("reward, weighted sum") :]
    low, high = (19 / 3 + sign * 4.30265273 * math.sqrt(13 / 3 / 3) for sign in (-1, 1))  # of 4, 8 and 7
    assert values[1:5] == [f"6.333 ({low:.4g} to {high:.4g})", "best 4, step 3", "1", "best 5, step 3"]
    assert any("95% t interval over seeds" in word for word in words)
    assert words[words.index("beta") + 1 :][:4] == ["0.04", "0.04", "0.04", "0.0"]


def test_the_curves(runs, monkeypatch):
    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg", Recorder)
    draw(grouped(read_runs(runs)), {"reward": "reward", "eval/rec/mean_iou": "mean IoU"})
    rewards, evaluations = Recorder.figure.axes
    assert [len(line.get_xdata()) for line in rewards.lines] == [5, 5, 3, 3, 5]  # three seeds, their mean, the other
    np.testing.assert_allclose(rewards.lines[3].get_xydata(), [(1, 1), (2, 2), (3, 4)])
    assert rewards.lines[0].get_color() == rewards.lines[3].get_color() != rewards.lines[4].get_color()
    np.testing.assert_allclose(evaluations.lines[4].get_xydata(), [(2, 0.1), (4, 0.2)])
    (legend,) = Recorder.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a0 and 2 more (seeds 0, 1, 2)", "b0"]


REFUSED = {
    "no runs": (["a0", "none", "empty"], ["none has no metrics.jsonl with a step", "empty has no metrics.jsonl"]),
    "a broken log": (["a0", "broken"], ["broken/metrics.jsonl:2: not a line of a log"]),
    "no finite value": (["nan", "nan", "step"], ["no metric of these runs has a finite value"]),
    "lines without a step": (["a0", "nosteps"], ["nosteps has no metrics.jsonl with a step"]),
    "no place for the page": (["a0", "b0", "--output", "no/page.html"], ["page.html cannot be written to"]),
    "one run, no place for the page": (["a0", "--output", "no/page.html"], ["page.html cannot be written to"]),
}


@pytest.mark.parametrize(("words", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compared_is_one_message(words, expected, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "broken", [1.0])
    (tmp_path / "broken/metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n{"step": 2,\n')
    for name, line in (("nan", '{"step": 1, "grad_norm": NaN}'), ("step", '{"step": 1}'), ("nosteps", '{"loss": 1.0}')):
        write(tmp_path / name, [])
        (tmp_path / name / "metrics.jsonl").write_text(line + "\n")
    assert main(["report", *words]) == 2
    message = capsys.readouterr().err
    assert message.count("vlmr1: ") == 1 and all(each in message for each in expected)


def test_runs_without_settings_or_with_other_metrics(tmp_path, monkeypatch):
    """The page is in the current directory where no --output is given."""
    monkeypatch.chdir(tmp_path)
    other = write(tmp_path / "other", [], settings=None)
    (other / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5, "reward": NaN, "name": "x"}\n')
    assert main(["report", str(write(tmp_path / "one", [1.0])), str(other)]) == 0
    words = Page((tmp_path / "comparison.html").read_text()).words
    assert any(word.endswith("settings are not known: other") for word in words)
