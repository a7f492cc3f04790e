"""`vlmr1 evaluate` from end to end on the embedded model: the same bytes elsewhere, interrupted, by two ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlmr1.cli import main
from vlmr1.evaluation.decode import Decoder
from vlmr1.evaluation.records import read_records
from vlmr1.models import load_model
from vlmr1.models.processor import load_processor, save_processor
from vlmr1.tiny import CHECKPOINT, digits

ROWS = 10
SAME = ("completions.jsonl", "results.json", "bootstrap.json", "evaluation.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    digits.write(folder, "held_out", ROWS, seed=3)
    return folder


def command(data: Path, output: Path, *more: str, model="tiny", task="rec", file: Path | None = None) -> list[str]:
    words = ["evaluate", "--model", model, "--task", task, "--data", str(file or data / "held_out.jsonl")]
    words += ["--images", str(data / "images"), "--output_dir", str(output), "--use_cpu"]
    return [*words, "--max_completion_length", "40", "--batch_size", "2", "--pictures", "2", *more]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    assert main(command(data, output)) == 0
    return output / "tiny"


def assert_same(one: Path, other: Path) -> None:
    for name in SAME:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def error(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_what_is_written(whole, data):
    results = json.loads((whole / "results.json").read_text())
    records = read_records(whole / "completions.jsonl")
    assert [record.row for record in records] == list(range(ROWS))
    assert [record.source for record in records] == [f"{data}/held_out.jsonl:{i + 1}" for i in range(ROWS)]
    assert 0.5 < results["metrics"]["mean_iou"]["value"] <= 1.0
    assert results["metrics"]["mean_iou"]["low"] <= results["metrics"]["mean_iou"]["value"]
    assert results["options"]["max_completion_length"] == 40 and results["rows"]["count"] == ROWS
    assert len(results["data"][0]["sha256"]) == len(results["model"]["digest"]) == 64
    assert str(whole.parent) not in "".join((whole / name).read_text() for name in SAME)
    assert json.loads((whole / "run.json").read_text())["folder"] == str(whole)
    page = (whole / "cases.html").read_text()
    assert page.count('<article class="card">') == 4 and "data:image/png;base64," in page


def test_again_elsewhere(whole, data, tmp_path):
    assert main(command(data, tmp_path / "deep/er")) == 0
    assert_same(tmp_path / "deep/er/tiny", whole)


def begun(whole: Path, output: Path, name: str = "completions.jsonl", content: bytes = b"") -> Path:
    """What a killed evaluation leaves: its settings, and completions in this file."""
    folder = output / "tiny"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_bytes((whole / "evaluation.json").read_bytes())
    (folder / name).write_bytes(content)
    return folder


def test_interrupted_in_the_midst_of_a_line(whole, data, tmp_path, monkeypatch):
    """Some batches are there, then half a batch that ends in half a line."""
    lines = (whole / "completions.jsonl").read_bytes().splitlines(keepends=True)
    folder = begun(whole, tmp_path, content=b"".join(lines[:5]) + lines[5][:-20])
    decoded, original = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, s, rows: decoded.extend(rows) or original(self, s, rows))
    for missing in ([4, 5, 6, 7, 8, 9], []):  # the unfinished batch is made again
        assert main(command(data, tmp_path)) == 0
        assert decoded == missing
        assert_same(folder, whole)
        decoded.clear()


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed(whole, data, tmp_path):
    words = [sys.executable, "-m", "vlmr1.cli", *command(data, tmp_path)]
    run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    path = tmp_path / "tiny" / "completions.jsonl"
    while not (path.exists() and path.read_bytes().count(b"\n") >= 2) and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "tiny" / "results.json").exists()
    assert 2 <= path.read_bytes().count(b"\n") < ROWS
    assert main(command(data, tmp_path)) == 0
    assert_same(tmp_path / "tiny", whole)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
def test_two_ranks(whole, data, tmp_path):
    """Some batches are there already; the ranks share the rest."""
    lines = (whole / "completions.jsonl").read_bytes().splitlines(keepends=True)
    folder = begun(whole, tmp_path, "completions.rank-1.jsonl", b"".join(lines[2:4]))
    words = [*TORCHRUN, "-m", "vlmr1.cli", *command(data, tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mean IoU") == 1  # one rank speaks
    assert_same(folder, whole)
    assert not list(folder.glob("completions.rank-*"))
    assert json.loads((folder / "run.json").read_text())["processes"] == 2


def refused(capsys, whole, data, tmp_path, *more: str) -> str:
    """The message of a second command in a directory where another was begun."""
    begun(whole, tmp_path / "out")
    return error(capsys, *command(data, tmp_path / "out", *more))


@pytest.mark.parametrize(
    "more, name",
    [
        (["--max_completion_length", "39"], "options.max_completion_length is 39"),
        (["--batch_size", "3"], "options.batch_size is 3"),
        (["--limit", "9"], "rows.count is 9"),
        (["--box_coordinates", "thousand"], "options.box_coordinates is 'thousand'"),
    ],
    ids=["length", "batch", "limit", "coordinates"],
)
def test_changed_settings_are_refused(more, name, whole, data, tmp_path, capsys):
    message = refused(capsys, whole, data, tmp_path, *more)
    assert message.startswith(f"vlmr1: {name}, but the evaluation in {tmp_path}/out/tiny was begun with ")


def test_changed_data_are_refused(whole, data, tmp_path, capsys):
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "images").symlink_to(data / "images")
    text = (data / "held_out.jsonl").read_text()
    (changed / "held_out.jsonl").write_text(text.replace("Locate the digit", "Locate  the digit", 1))
    assert "rows.sha256 is " in refused(capsys, whole, changed, tmp_path)


def saved(folder: Path, change: float = 0) -> Path:
    """The embedded model under another name, with one weight changed."""
    model = load_model(CHECKPOINT)
    model.lm_head.weight.data[-1, -1] += change
    model.save_pretrained(folder)
    save_processor(load_processor(CHECKPOINT), folder)
    return folder


def test_a_changed_model_is_refused(data, tmp_path, capsys):
    words = command(data, tmp_path / "out", "--limit", "2", model=str(saved(tmp_path / "model")))
    assert main(words) == 0
    saved(tmp_path / "model", change=1)
    assert "vlmr1: model.digest is " in error(capsys, *words)


def test_two_models_and_their_comparison(data, tmp_path, capsys):
    """The second one is cut short, so that it answers nothing."""
    folder = saved(tmp_path / "model")
    words = command(data, tmp_path / "out", "--limit", "4")
    words[2:3] = ["tiny", str(folder)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert text in shown and text.startswith("| metric | tiny | ")
    assert "| +0.0000 (+0.0000 to +0.0000) |" in text

    assert main(command(data, tmp_path / "short", "--limit", "4", "--max_completion_length", "2")) == 0
    capsys.readouterr()
    pair = [str(tmp_path / "out" / "tiny"), str(tmp_path / "short")]
    assert main(["evaluate", "compare", *pair, "--out", str(tmp_path / "table.md")]) == 0
    text = (tmp_path / "table.md").read_text()
    assert text == capsys.readouterr().out
    long, short = (json.loads((Path(f) / "results.json").read_text()) for f in (pair[0], f"{pair[1]}/tiny"))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    rows = {name: values for name, *values in cells}
    value = long["metrics"]["mean_iou"]["value"]
    assert rows["mean IoU"][0].startswith(f"{value:.4f} (") and rows["mean IoU"][1] == "0.0000 (0.0000 to 0.0000)"
    assert rows["mean IoU"][2].startswith(f"{-value:+.4f} (") and short["metrics"]["mean_iou"]["value"] == 0
    values = ("0.0000 (0.0000 to 0.0000)", "1.0000 (1.0000 to 1.0000)", "+1.0000 (+1.0000 to +1.0000)")
    assert tuple(rows["answer not read"]) == values
    assert rows["tokens a completion"][1] == "2.0 (2.0 to 2.0)"


def test_results_of_other_rows_do_not_compare(whole, data, tmp_path, capsys):
    assert main(command(data, tmp_path, "--limit", "2")) == 0
    message = error(capsys, "evaluate", "compare", str(whole), str(tmp_path))
    assert message.startswith("vlmr1: compare: rows.count is 10 for tiny and 2 for tiny: not the same rows")


def test_detection(data, tmp_path, capsys):
    """The digits as a COCO file: the model answers one box with its label, whatever it is asked."""
    rows = [json.loads(line) for line in (data / "held_out.jsonl").read_text().splitlines()[:4]]
    answers = [json.loads(row["conversations"][1]["value"][len("<answer>") : -len("</answer>")]) for row in rows]
    labels = sorted({answer["label"] for answer in answers})
    content = {
        "images": [{"id": i, "file_name": row["image"], "text": [answers[i]["label"]]} for i, row in enumerate(rows)],
        "categories": [{"id": i, "name": label} for i, label in enumerate(labels)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": labels.index(answer["label"]), "bbox": [x1, y1, x2 - x1, y2 - y1]}
            for i, (answer, (x1, y1, x2, y2)) in enumerate((answer, answer["bbox_2d"]) for answer in answers)
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    assert main(command(data, tmp_path, task="ovd", file=tmp_path / "coco.json")) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "tiny" / "results.json").read_text())
    assert set(results["metrics"]) >= {"ap", "ap50", "ap75", "nms_ap", "unknown_label_share"} and "NMS-AP" in shown
    assert results["counts"]["true_boxes"] == 4 and results["counts"]["labels"] == len(labels)


def test_answers_in_words(data, tmp_path, capsys):
    row = {"prompt": "Locate the digit 1.", "image": "held_out-00000.png", "solution": "x"}
    rows = [row, row | {"accu_reward_method": "yes_no", "solution": "yes"}]
    (tmp_path / "vqa.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    words = command(data, tmp_path, task="vqa", file=tmp_path / "vqa.jsonl")
    assert main([*words, "--accu_reward_method", "all_match", "--reward_workers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "mean score, all_match" in shown and "mean score, yes_no" in shown
    counts = json.loads((tmp_path / "tiny" / "results.json").read_text())["counts"]
    assert counts["rows_by_method"] == {"all_match": 1, "yes_no": 1}


def test_faults_are_found_before_a_model_is_loaded(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vlmr1.evaluation.loading.load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "data.jsonl").write_text((data / "held_out.jsonl").read_text().replace("held_out-00003.png", "no.png"))
    words = command(data, tmp_path / "out", file=tmp_path / "data.jsonl")
    assert error(capsys, *words) == f"vlmr1: {tmp_path}/data.jsonl:4: image no.png is missing in {data}/images\n"
    assert not (tmp_path / "out").exists()
