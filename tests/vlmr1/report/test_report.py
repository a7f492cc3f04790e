"""The HTML report and the reward curve: what is in the files, read back."""

from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.helpers.pages import Page, Recorder
from vlmr1.report.curves import reward_curve, running_error, running_mean
from vlmr1.report.demo import Example, write_report

HISTORY = [{"step": 10 * i, "reward": i / 10, "kl": 0.01 * i, "completion_length": 20.0} for i in range(1, 21)]


@pytest.fixture
def curve(tmp_path):
    return reward_curve(HISTORY, tmp_path / "curve.png")


@pytest.fixture
def example(tmp_path):
    Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3)).save(tmp_path / "digit.png")
    return Example(
        image=tmp_path / "digit.png",
        question="Where is <7> & why?",
        true_box=(8, 16, 40, 32),
        box_before=(30, 30, 10, 12.5),  # corners in the wrong order
        box_after=(9, 15, 41, 33),
        iou_before=0.25,
        iou_after=0.8125,
        text_before="<script>alert(1)</script>",
        text_after='<answer>{"bbox_2d": [9, 15, 41, 33]}</answer>',
    )


@pytest.fixture
def write(tmp_path, curve):
    def write(*examples, **changes) -> tuple[str, Page]:
        arguments = {
            "title": "A <run>",
            "summary_head": ("", "before", "after", "<change>"),
            "summary_rows": [("mean IoU", "0.40", "0.50", "+0.10"), ("<kl>", "0", "0.1", "")],
            "curve_png": curve,
            "examples": examples,
            "settings": {"learning_rate": 5e-5, "reward_funcs": ["accuracy", "<b>"]},
            "notes": ["measured on 2 & 3"],
        }
        path = write_report(tmp_path / "report.html", **{**arguments, **changes})
        text = path.read_text(encoding="utf-8")
        return text, Page(text)

    return write


def test_images_are_inside_byte_for_byte(write, example, curve):
    _, page = write(example)
    prefix = "data:image/png;base64,"
    sources = [image["src"] for image in page.of("img")]
    assert [source[: len(prefix)] for source in sources] == [prefix, prefix]
    assert [b64decode(source[len(prefix) :]) for source in sources] == [curve.read_bytes(), example.image.read_bytes()]


def test_boxes_in_pixels_of_the_image(write, example):
    text, page = write(example)
    assert '<svg viewBox="0 0 60 40">' in text
    drawn = {"true": [(8, 16, 32, 16)], "before": [(10, 12.5, 20, 17.5)], "after": [(9, 15, 32, 18)]}
    assert page.boxes(legend=3) == drawn


@pytest.mark.parametrize("box", [pytest.param(None, id="none"), pytest.param((0, 0, float("inf"), 5), id="infinite")])
def test_a_box_that_cannot_be_drawn_is_left_out(box, write, example):
    _, page = write(replace(example, box_before=box, iou_before=0.0))
    assert [r["class"] for r in page.of("rect")[3:]] == ["halo", "true", "halo", "after"]
    assert ("0.00 (no box)" in page.words) == (box is None)


def test_text_is_escaped_and_nothing_is_fetched(write, example):
    text, page = write(example)
    assert page.of("script") == [] and page.of("run") == [] and page.of("b") == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    for words in (
        "A <run>",
        "Where is <7> & why?",
        example.text_before,
        example.text_after,
        "<kl>",
        "<change>",
        "['accuracy', '<b>']",
        "measured on 2 & 3",
    ):
        assert words in page.words
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    assert page.of("link") == [] and page.of("a") == []


def test_a_card_for_each_example(write, example):
    assert [len(write(*[example] * n)[1].of("article")) for n in (0, 1, 5)] == [0, 1, 5]


def test_running_mean():
    values = np.array([1.0, 3.0, np.nan, 5.0, 9.0])
    np.testing.assert_allclose(running_mean(values, 2), [1.0, 2.0, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(running_mean(np.array([np.nan, 4.0]), 1), [np.nan, 4.0])


def test_running_error():
    """1.96 s / sqrt(n) of the window's valid values; none of a single value."""
    error = running_error(np.array([1.0, 3.0, np.nan, 5.0, 9.0]), 3)
    pair = [1.96 * np.std(each, ddof=1) / np.sqrt(2) for each in ([1, 3], [3, 5], [5, 9])]
    np.testing.assert_allclose(error, [0.0, pair[0], pair[0], pair[1], pair[2]])


def test_curve_draws_each_step_and_its_running_mean(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg", Recorder)
    history = [*HISTORY, {"step": 210, "rewards/format/mean": 1.0, "rewards/format/std": 0.1}]
    reward_curve(history, tmp_path / "curve.png", window=4)
    panels = Recorder.figure.axes
    assert [p.get_ylabel() for p in panels] == ["reward", "rewards/format/mean", "kl", "completion_length"]
    assert panels[1].get_title(loc="left") == "format reward"
    assert {p.get_xlabel() for p in panels} == {"step"}
    steps, mean = panels[0].lines
    np.testing.assert_allclose(steps.get_xdata(), np.arange(10, 201, 10))
    np.testing.assert_allclose(steps.get_ydata(), np.arange(1, 21) / 10)
    np.testing.assert_allclose(mean.get_ydata()[[0, 3, 19]], [0.1, 0.25, 1.85])
    band = panels[0].collections[0].get_paths()[0].vertices
    error = 1.96 * np.std([1.7, 1.8, 1.9, 2.0], ddof=1) / 2
    np.testing.assert_allclose(sorted(set(band[band[:, 0] == 200, 1].round(9))), [1.85 - error, 1.85 + error])
    assert [list(line.get_xdata()) for line in panels[1].lines] == [[210.0], [210.0]]


def test_a_run_without_kl_has_no_panel_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg", Recorder)
    reward_curve([{**row, "kl": 0.0} for row in HISTORY], tmp_path / "curve.png")
    assert [p.get_ylabel() for p in Recorder.figure.axes] == ["reward", "completion_length"]


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 0.5}]], ids=["empty", "other-keys"])
def test_nothing_to_draw_is_an_error(history, tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        reward_curve(history, tmp_path / "curve.png")
