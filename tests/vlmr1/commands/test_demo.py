"""The demo from end to end, in a few steps, and `vlmr1 evaluate` on its checkpoint; its table and its controls."""

import json
import re

import pytest

from tests.helpers.pages import Page
from vlmr1.cli import main
from vlmr1.commands import controls, demo, held_out
from vlmr1.evaluation.evaluate import Evaluation
from vlmr1.evaluation.rec import score_rec
from vlmr1.lifecycle.checkpoint import sha256_of_file
from vlmr1.report.progress import read_metrics
from vlmr1.tiny import CHECKPOINT

METRICS = [f"{kind} {name}" for kind in ("greedy", "sampled") for name in ("mean IoU", "acc@0.5", "format")]
CHANGES = ["--prompts_per_device", "2", "--num_generations", "4", "--use_cpu", "true"]
THOUGHT = "<think>\nI see it.\n</think>\n"


def answer(x2: int, thought: str = THOUGHT) -> str:
    """A box from the corner, 10 px high."""
    return f'{thought}<answer>\n{{"bbox_2d": [0, 0, {x2}, 10]}}\n</answer>'


def evaluation(greedy: list[str], sampled: list[str]) -> Evaluation:
    """The evaluation of rows whose true box is 10 by 10 px; two draws a row."""
    true = answer(10, "")
    drawn = score_rec(sampled, [true] * len(sampled))
    return Evaluation(score_rec(greedy, [true] * len(greedy)), greedy, drawn, tuple(sampled))


def test_table_of_hand_numbers():
    """IoUs are 10 / x2; every row gains as much greedily, so the paired interval is that gain."""
    before = evaluation([answer(20), answer(25)], [answer(20), answer(40), answer(20, ""), "no box"])
    after = evaluation([answer(16), answer(19, "")], [answer(10), answer(10), answer(10), answer(20)])
    assert before.rows["greedy mean IoU"].tolist() == [0.5, 0.4] and before.sampled is not None
    assert before.rows["sampled mean IoU"].tolist() == [0.375, 0.25]
    head, rows = demo.table(before, after, {"other": dict.fromkeys(METRICS, 0.25)})
    assert head == ("", "before", "GRPO", "change (95% interval)", "other")
    found = {name: cells for name, *cells in rows}
    assert list(found) == METRICS
    gain = (10 / 16 + 10 / 19) / 2 - 0.45
    low, high = sorted((10 / 16 - 0.5, 10 / 19 - 0.4))
    assert found["greedy mean IoU"] == [
        "0.450", f"{0.45 + gain:.3f}", f"{gain:+.3f} ({low:.3f} to {high:.3f})", "0.250"
    ]  # fmt: skip
    assert found["sampled mean IoU"][:2] == ["0.312", "0.875"]
    assert found["greedy acc@0.5"][:3] == ["0.000", "1.000", "+1.000 (1.000 to 1.000)"]  # 0.5 itself is no hit
    assert found["sampled acc@0.5"][:2] == ["0.000", "0.750"]
    assert found["greedy format"][:3] == ["1.000", "0.500", "-0.500 (-1.000 to 0.000)"]
    assert found["sampled format"][:2] == ["0.500", "1.000"]
    assert "from 0.45 to 0.58 in 7 updates" in demo.sentence(before, after, 7)
    assert "did not help" in demo.sentence(after, before, 7)
    lines = demo.aligned([head, *rows])
    assert (
        len({len(line) for line in lines}) == 1
        and len(lines[0]) <= 80
        and lines[1].split()[:3] == ["greedy", "mean", "IoU"]
    )


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(held_out, "ROWS", 20)
    monkeypatch.setattr("vlmr1.tiny.digits.TRAIN_ROWS", 16)


@pytest.mark.slow
def test_demo_and_evaluate(tmp_path, capsys, small):
    out = tmp_path / "out"
    assert (
        main(["demo", "--seed", "2", "--output_dir", str(out), "--max_steps", "3", "--save_steps", "2", *CHANGES]) == 0
    )
    shown = capsys.readouterr().out
    table = dict(re.findall(r"^(\w+ \S.*?)\s{2,}[\d.]+\s+([\d.]+)\s+[+-]\d", shown, re.M))
    assert list(table) == METRICS
    assert "16 rows; an update: 2 prompts x 4 generations = 8 sequences on 1 device; 8 updates an epoch" in shown
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3]
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.html").read_text()
    assert report.count('<article class="card">') == demo.SHOWN
    assert all(value in report for value in table.values())
    heads = [str(word) for word in Page(report).words if word.strip() in {"before", "GRPO", *controls.ARMS}]
    assert heads == ["before", "GRPO", *controls.ARMS]
    assert re.search(r"^seconds +prepare \d+, evaluate \d+, train \d+, report \d+; \d+ in all$", shown, re.M)
    assert f"open       {out / 'report.html'}" in shown

    data, results = out / "data", tmp_path / "results"
    words = ["evaluate", "--model", str(out / "checkpoint-3"), "--task", "rec", "--output_dir", str(results)]
    words += ["--data", str(data / "held_out.jsonl"), "--images", str(data / "images"), "--max_completion_length", "48"]
    assert main(words) == 0
    (path,) = results.glob("*/results.json")
    mean_iou = json.loads(path.read_text())["metrics"]["mean_iou"]["value"]
    assert f"{mean_iou:.4f}" in capsys.readouterr().out
    assert f"{mean_iou:.3f}" == table["greedy mean IoU"]


@pytest.mark.slow
def test_controls_are_added_by_seed(tmp_path, monkeypatch, small):
    """Seeds of the same start, updates and images are kept; others leave."""
    file = tmp_path / "controls.json"
    monkeypatch.setattr(controls, "CONTROLS", file)
    monkeypatch.setattr(controls, "ARMS", {"exact": controls.ARMS["exact"]})
    start = sha256_of_file(CHECKPOINT / "model.safetensors")
    for updates, kept in ((2, ["3", "7"]), (1, ["3"])):
        file.write_text(json.dumps({"updates": 2, "rows": 20, "start": start, "seeds": {"7": {}}}))
        words = ["--output_dir", str(tmp_path / str(updates)), "--max_steps", str(updates), "--use_cpu", "true"]
        assert main(["demo", "--controls", "--seed", "3", *words, "--prompts_per_device", "2"]) == 0
        content = json.loads(file.read_text())
        assert sorted(content["seeds"]) == kept and content["updates"] == updates
        scores = content["seeds"]["3"]["exact"]
        assert list(scores) == METRICS
        assert all(low <= change <= high for change, low, high in (score["change"] for score in scores.values()))
        exact = (tmp_path / str(updates) / "exact" / "metrics.jsonl").read_text()
        assert len(exact.splitlines()) == updates


def test_controls_file():
    """It is of the shipped start and of the recipe's number of updates, and holds every arm of each seed."""
    content = json.loads(controls.CONTROLS.read_text())
    assert content["start"] == sha256_of_file(CHECKPOINT / "model.safetensors")
    assert f"max_steps: {content['updates']}\n" in (CHECKPOINT.parents[1] / "recipes/tiny-digits.yaml").read_text()
    for seed, arms in content["seeds"].items():
        assert set(arms) == set(controls.ARMS), seed
        assert all(list(scores) == METRICS for scores in arms.values())
    shown, note = controls.read_controls(seed=10**6)
    first = min(content["seeds"])
    assert f"seed {first}" in note
    assert shown["exact"]["greedy mean IoU"] == content["seeds"][first]["exact"]["greedy mean IoU"]["value"]
