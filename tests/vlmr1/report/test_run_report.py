"""The page of a training run, read back: curves, completions with images and boxes, also of a run that goes on."""

import errno
import io
import json
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.digit_runs import command
from tests.helpers.pages import Page, Recorder
from tests.helpers.trainers import recorded, trainer_of
from vlmr1.cli import main
from vlmr1.commands.report import report_of_run
from vlmr1.errors import OutputError
from vlmr1.report.panels import run_curves
from vlmr1.report.pictures import keep_picture, read_picture
from vlmr1.report.progress import METRICS
from vlmr1.report.training import chosen_steps, completion_boxes, true_boxes, write_run_report
from vlmr1.types import ImageBytes

BOX = '<answer>{"bbox_2d": [10, 20, 30, 50]}</answer>'
ROWS = [
    {"step": i, "reward": 0.1 * i, "rewards/accuracy/mean": 0.1 * i, "rewards/accuracy/std": 0.05, "kl": 0.01}
    | {"seconds/rollout": 2.0, "seconds/update": 1.0, "memory/rollout_mib": 100.0, "memory/peak_mib": 120.0}
    for i in range(1, 6)
]


def record(step: int = 1, **changes: Any) -> dict[str, Any]:
    base = {"step": step, "source": "a.jsonl:3", "images": [], "pictures": [], "box_scale": None, "completion": BOX}
    base |= {"solution": '{"bbox_2d": [12, 20, 30, 52]}', "rewards": [0.75, 1.0], "advantage": -0.5}
    return base | {"finish_reason": "stop", "timed_out": []} | changes


def write(run: Path, records: list[dict[str, Any]], rows: list[dict[str, Any]] = ROWS) -> tuple[str, Page]:
    for name, lines in (("metrics.jsonl", rows), ("completions.jsonl", records)):
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_run_report(run).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture
def photo(tmp_path) -> Path:
    """1200 x 900 px on the screen, stored on its side."""
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 255, (75, 100, 3), dtype=np.uint8)
    upright = Image.fromarray(pixels).resize((1200, 900))
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    return path


def decoded(uri: str | None) -> Image.Image:
    assert uri is not None
    return Image.open(io.BytesIO(b64decode(uri.partition(",")[2])))


def test_boxes_are_in_pixels_of_the_upright_image(tmp_path, photo):
    text, page = write(tmp_path, [record(images=[str(photo)])])
    picture = decoded(page.of("img")[1]["src"])
    assert picture.size == (448, 336) and '<svg viewBox="0 0 1200 900">' in text
    assert page.boxes(2) == {"true": [(12, 20, 18, 32)], "after": [(10, 20, 20, 30)]}
    assert "rewards 0.75, 1" in text and "advantage -0.50" in text and "a.jsonl:3" in text


DRAWN = {  # changes of a record -> pictures, boxes that are drawn
    "other coordinates": ({"box_scale": [1.2, 0.9]}, 1, {"true": [(12, 20, 18, 32)], "after": [(12, 18, 24, 27)]}),
    "no box": ({"completion": "<answer>B</answer>", "solution": "B"}, 1, {}),
    "several images": ({"images": [""] * 6, "pictures": [None] * 6}, 4, {}),
}


@pytest.mark.parametrize("changes, pictures, boxes", DRAWN.values(), ids=DRAWN.keys())
def test_boxes_are_scaled_and_belong_to_one_image(changes, pictures, boxes, tmp_path, photo):
    made = record(**{"images": [""]} | changes)
    _, page = write(tmp_path, [made | {"images": [str(photo)] * len(made["images"])}])
    assert len(page.of("img")) == 1 + pictures and page.boxes(2) == boxes


def test_several_boxes_and_none():
    several = '<answer>[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 9, 9]}]</answer>'
    assert completion_boxes(several) == [(1, 2, 3, 4), (5, 6, 9, 9)]
    assert true_boxes("```json\n" + several[8:-9] + "\n```") == [(1, 2, 3, 4), (5, 6, 9, 9)]
    for text in ("no answer", "<answer>B</answer>", "<answer>None</answer>", several.replace("<answer>", "<think>")):
        assert completion_boxes(text) == []


def test_images_that_are_bytes_missing_or_broken(tmp_path, photo):
    data = photo.read_bytes()
    image = ImageBytes.of(data, "rows.parquet:7 <image>")
    kept = keep_picture(image, tmp_path / "completion_images")
    assert kept == {"file": f"completion_images/{image.key}.jpeg", "size": [1200, 900]}
    assert keep_picture(photo, tmp_path / "elsewhere") is None and not (tmp_path / "elsewhere").exists()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture at all")
    records = [
        record(images=[str(image)], pictures=[kept]),
        record(images=[str(tmp_path / "gone.png")], pictures=[None]),
        record(images=[str(broken)], pictures=[None]),
        record(images=[]),
    ]
    text, page = write(tmp_path, records)
    assert len(page.of("article")) == 4 and len(page.of("img")) == 2  # the curves and one picture
    assert decoded(page.of("img")[1]["src"]).size == (448, 336) and '<svg viewBox="0 0 1200 900">' in text
    for name in ("gone.png", "broken.png"):
        assert f"no image that can be read: {tmp_path / name}" in page.words


def test_a_picture_is_whole_or_absent(tmp_path, photo, monkeypatch):
    image = ImageBytes.of(photo.read_bytes(), "rows.parquet:7 <image>")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OutputError, match=r"completion_images cannot be written to .*: No space left on device"):
            keep_picture(image, tmp_path / "completion_images")
    assert list((tmp_path / "completion_images").iterdir()) == []
    kept = keep_picture(image, tmp_path / "completion_images")
    assert kept is not None and Image.open(tmp_path / kept["file"]).size == (448, 336)


def test_no_room_for_the_page_is_a_warning(tmp_path, caplog):
    (tmp_path / METRICS).write_text('{"step": 1, "kl": 0.0}\n')
    (tmp_path / "training.html").symlink_to("/dev/full")
    report_of_run(tmp_path)
    assert "training.html cannot be written to" in caplog.text and "No space left on device" in caplog.text


def test_small_images_keep_their_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    picture = read_picture(tmp_path / "small.png")
    assert picture is not None and picture.crisp and picture.size == (30, 20)
    assert np.array_equal(np.asarray(decoded(picture.uri)), pixels)


def test_everything_is_escaped_and_nothing_is_fetched(tmp_path):
    evil = "<script>alert(1)</script>"
    cut = {"finish_reason": "length", "timed_out": [evil]}
    text, page = write(tmp_path, [record(completion=evil, solution=evil, source=evil, images=[evil], **cut)])
    assert page.of("script") == [] and "http://" not in text and "https://" not in text and "url(" not in text
    assert page.words.count(evil) == 2 and "cut at the length limit" in text
    assert page.of("link") == [] and any("starts near 0" in words for words in page.words)


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [([], 3, []), ([1, 2], 3, [1, 2]), (list(range(1, 101)), 3, [1, 51, 100]), ([5, 10, 15, 20], 2, [5, 20])],
)
def test_chosen_steps(steps, count, expected):
    assert chosen_steps(steps, count) == expected


def test_a_long_run_shows_a_few_of_its_steps(tmp_path):
    records = [record(step) for step in range(1, 201) for _ in range(8)]
    text, page = write(tmp_path, records)
    assert "Completions of 12 of 200 steps" in text and len(page.of("article")) == 12 * 6
    assert "<h3>Step 1</h3>" in text and "<h3>Step 200</h3>" in text


def test_a_run_that_has_just_begun(tmp_path):
    (tmp_path / "completions.jsonl").write_text(json.dumps(record()) + "\n" + json.dumps(record(2))[:40])
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text())
    assert len(page.of("article")) == 1 and page.of("img") == []


def test_the_curves_are_those_of_the_metrics(monkeypatch):
    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg", Recorder)
    rows = [dict(row) for row in ROWS]
    del rows[2]["seconds/rollout"]  # an update on the buffer
    run_curves(rows)
    panels = {axes.get_title(loc="left"): axes for axes in Recorder.figure.axes}
    assert list(panels) == [
        "reward, weighted sum",
        "accuracy reward",
        "KL to the reference, nats a token",
        "peak memory by phase, MiB",
        "seconds a step by phase",
    ]
    line = panels["accuracy reward"].lines[0]
    np.testing.assert_allclose(line.get_xydata(), [(i, 0.1 * i) for i in range(1, 6)])
    memory = panels["peak memory by phase, MiB"].get_legend_handles_labels()[1]
    assert memory == ["rollout", "peak"]
    lower, upper = panels["seconds a step by phase"].collections
    heights = [max(y for x, y in area.get_paths()[0].vertices if x == 3) for area in (lower, upper)]
    assert heights == [0.0, 1.0]  # of step 3: no rollout, and the update on it
    assert max(y for x, y in upper.get_paths()[0].vertices if x == 4) == 3.0
    assert run_curves([]) is None


@pytest.mark.parametrize("count", [0, 2])
def test_completions_of_a_run_are_recorded_for_the_page(count, model, processor, tmp_path):
    rows = recorded(trainer_of(model, processor, tmp_path, log_completions=count), tmp_path)
    assert [(row["step"], len(row["rewards"])) for row in rows] == [(1, 2)] * count
    assert all(row["images"][0].endswith(".png") for row in rows)
    page = Page(write_run_report(tmp_path).read_text())
    assert len(page.of("article")) == count and len(page.of("img")) == 1 + count
    assert len(page.boxes(2).get("true", [])) == count


@pytest.mark.slow
@pytest.mark.parametrize("written", [True, False])
def test_a_run_ends_with_its_report(written, data, tmp_path):
    more = ["--max_steps", "1", "--max_completion_length", "8", "--write_report", str(written).lower()]
    assert main(command(data, tmp_path, *more)) == 0
    assert (tmp_path / "training.html").exists() == written
