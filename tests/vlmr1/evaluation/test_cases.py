"""The picture page: what is chosen, what is drawn, that nothing of a model or a data set becomes markup."""

import io
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.pages import Page
from vlmr1.report.cases import Case, LabelledBox, choose, write_cases
from vlmr1.types import Sample

EVIL = "<script>alert('x')</script> & \"quoted\""


def sample(*images: Path) -> Sample:
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": f"Where? {EVIL}"}]
    return Sample([{"role": "user", "content": content}], images, "", f"{EVIL}.jsonl:1", 0)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 1200, 3), dtype=np.uint8)).save(path)
    return path


def page(folder, *cases, count=12) -> tuple[str, Page]:
    rows = [("mean IoU", "0.5", "0.4 to 0.6"), (EVIL, EVIL, EVIL)]
    text = write_cases(folder / "cases.html", title=EVIL, rows=rows, cases=cases, count=count).read_text("utf-8")
    return text, Page(text)


def test_everything_is_escaped_and_nothing_is_fetched(image, tmp_path):
    box = LabelledBox(EVIL, (10.0, 20.0, 300.0, 400.0))
    cases = Case(sample(image), EVIL, 0.5, (box,), (box,)), Case(sample(image), EVIL, 1.0, solution=EVIL)
    text, found = page(tmp_path, *cases)
    assert found.of("script") == [] and "<script>alert" not in text
    said = "".join(found.words)
    # title twice, table, question, source, completion, labels, solution
    assert said.count(EVIL) == 1 + 1 + 3 + 2 * 3 + 2 + 1
    assert all(each["src"].startswith("data:image/") for each in found.of("img"))
    assert "http://" not in text and "https://" not in text and "url(" not in text and found.of("link") == []


def test_boxes_are_in_pixels_of_the_file_and_the_image_is_smaller(image, tmp_path):
    true, said = LabelledBox("cat", (10.0, 20.0, 300.0, 400.0)), LabelledBox("dog", (300.0, 0.0, 250.0, 5.0))
    broken = LabelledBox("x", (0.0, 0.0, float("inf"), 5.0))
    text, found = page(tmp_path, Case(sample(image), "", 0.5, (true,), (said, broken)))
    assert '<svg viewBox="0 0 1200 600">' in text
    boxes = [each for each in found.of("rect")[2:] if each["class"] != "halo"]
    drawn = [tuple(each[name] for name in ("class", "x", "y", "width", "height")) for each in boxes]
    assert drawn == [("true", "10", "20", "290", "380"), ("after", "250", "0", "50", "5")]
    assert [each["class"] for each in found.of("text")] == ["true", "after"]
    (uri,) = [each["src"] for each in found.of("img")]
    with Image.open(io.BytesIO(b64decode(uri.partition(",")[2]))) as shown:
        assert (shown.format, shown.size) == ("JPEG", (448, 224))


def test_all_images_of_a_row(image, tmp_path):
    _, found = page(tmp_path, Case(sample(image, image), "", 0.5), Case(sample(), "", 0.25))
    assert len(found.of("img")) == 2 and found.of("svg") == [] and len(found.of("article")) == 2


CHOICES = [(10, 3, [0, 1, 2], [9, 8, 7]), (3, 12, [0, 1], [2]), (1, 12, [0], []), (5, 0, [], [])]


@pytest.mark.parametrize("cases, count, worst, best", CHOICES)
def test_choice(cases, count, worst, best):
    made = [Case(sample(), str(i), i / 10) for i in range(cases)]
    assert [[int(case.completion) for case in part] for part in choose(made, count)] == [worst, best]


def test_equal_scores_are_in_the_order_of_the_data():
    made = [Case(sample(), str(i), 1.0) for i in range(6)]
    assert [[case.completion for case in part] for part in choose(made, 2)] == [["0", "1"], ["2", "3"]]
