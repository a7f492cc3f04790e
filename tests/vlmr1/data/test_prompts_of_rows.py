"""TRL's rows -> samples: prompts as text and as messages, images as names, bytes and open images."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vlmr1.data.folder import ImageFolder
from vlmr1.data.formats import Columns
from vlmr1.data.images import open_image
from vlmr1.data.rows import ListRows
from vlmr1.data.samples import Samples
from vlmr1.errors import DataError
from vlmr1.types import ImageBytes

IMAGE = {"type": "image"}
TEMPLATE = "Look. {question} Answer."


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 30), (7, 8, 9)).save(tmp_path / "a.png")
    return ImageFolder(tmp_path)


def text(value):
    return {"type": "text", "text": value}


def encoded(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def sample(folder, row, question=TEMPLATE, columns=None):
    samples = Samples([(ListRows("rows", [row]), folder)], question, columns or Columns())
    return samples[0]


def shown(made):
    """Role and parts of each message, an image as I, a text as itself."""
    return [
        (each["role"], ["I" if part == IMAGE else part["text"] for part in each["content"]]) for each in made.messages
    ]


def user(content):
    return {"role": "user", "content": content}


SYSTEM, ASSISTANT = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "A cat."}
TURNS = [user([IMAGE, text("What?")]), ASSISTANT, user([text(" And "), IMAGE])]
SAID = [("user", ["I", "What?"]), ("assistant", ["A cat."]), ("user", ["Look.  And ", "I", " Answer."])]
WHERE = ("user", ["I", "Look. Where? Answer."])
NULLS = [user([{"type": "image", "text": None}, text("Where?")])]
PROMPTS = {
    "text": ("Where? ", 0, [("user", ["Look. Where? Answer."])]),
    "text and images": ("Where?", 2, [("user", ["I", "I", "Look. Where? Answer."])]),
    "marker": ("In <image>?", 1, [("user", ["Look. In ", "I", "? Answer."])]),
    "marker last": ("Find it in <image>", 1, [("user", ["Look. Find it in ", "I", " Answer."])]),
    "no text": ("<image>", 1, [("user", ["I", "Look.  Answer."])]),
    "messages": ([SYSTEM, user("Where?")], 1, [("system", ["Be brief."]), WHERE]),
    "turns of parts": (TURNS, 2, SAID),
    "nulls of a table": (NULLS, 1, [WHERE]),
    "a marker in a part": ([user([text("In <image>?")])], 1, [("user", ["Look. In ", "I", "? Answer."])]),
}


@pytest.mark.parametrize("prompt, images, expected", PROMPTS.values(), ids=PROMPTS)
def test_prompts(folder, prompt, images, expected):
    made = sample(folder, {"prompt": prompt, "images": ["a.png"] * images, "solution": "x"})
    assert shown(made) == expected
    assert len(made.images) == images


def test_without_a_template_messages_stay_as_they_are(folder):
    content = [text(" Where "), IMAGE, text("\n")]
    row = {"prompt": [{"role": "user", "content": content}], "image": "a.png", "solution": "x"}
    made = sample(folder, row, "{question}")
    assert made.messages == [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "value, colour, name",
    [
        pytest.param("a.png", (7, 8, 9), None, id="name"),
        pytest.param(encoded((1, 2, 3)), (1, 2, 3), "1 of rows:1", id="bytes"),
        pytest.param({"bytes": encoded((1, 2, 4)), "path": None}, (1, 2, 4), "1 of rows:1", id="struct"),
        pytest.param({"bytes": encoded((1, 2, 5)), "path": "cat.png"}, (1, 2, 5), "cat.png", id="named-struct"),
        pytest.param({"bytes": None, "path": "a.png"}, (7, 8, 9), None, id="struct-of-a-file"),
        pytest.param({"path": "a.png"}, (7, 8, 9), None, id="path-only"),
        pytest.param(Image.new("RGB", (40, 30), (1, 2, 6)), (1, 2, 6), "1 of rows:1", id="open"),
    ],
)
@pytest.mark.parametrize("column", ["image", "images"])
def test_images(folder, tmp_path, value, colour, name, column):
    row = {"prompt": "Where?", "solution": "x", column: [value] if column == "images" else value}
    (image,) = sample(folder, row).images
    if name is None:
        assert image == tmp_path / "a.png"
    else:
        assert isinstance(image, ImageBytes)
        assert image.name == name
    assert np.unique(np.asarray(open_image(image, "x")).reshape(-1, 3), axis=0).tolist() == [list(colour)]


@pytest.mark.parametrize("columns", [{"image": None}, {"images": None}, {"images": []}, {}], ids=repr)
def test_rows_without_images(folder, columns):
    made = sample(folder, {"prompt": "1 + 1?", "solution": 2} | columns, "{question}")
    assert (made.images, made.solution, made.columns) == ((), "2", {})
    assert made.messages == [{"role": "user", "content": [text("1 + 1?")]}]


def test_named_columns(folder):
    row = {"problem": "Where?", "answer": {"bbox_2d": [1, 2, 3, 4]}, "level": 3, "prompt": "not this"}
    made = sample(folder, row, "{question}", Columns("problem", "answer"))
    assert shown(made) == [("user", ["Where?"])]
    assert json.loads(made.solution) == {"bbox_2d": [1, 2, 3, 4]}
    assert made.columns == {"level": 3, "prompt": "not this"}


@pytest.mark.parametrize(
    "row, expected",
    [
        pytest.param({"prompt": []}, "the prompt is neither text nor a list of messages but []", id="no-messages"),
        pytest.param({"prompt": ["a"]}, 'a message is {"role": system or user or assistant', id="no-message"),
        pytest.param({"prompt": [{"role": "user"}]}, "the content of a message is neither text nor parts", id="empty"),
        pytest.param({"prompt": " "}, "a turn of user is empty", id="blank"),
        pytest.param({"prompt": "a", "image": {"size": 3}}, "image is neither a file name nor a", id="no-path"),
        pytest.param(
            {"prompt": "a", "image": Image.new("F", (9, 9), 7)}, "image 1 of rows:1 cannot be read", id="range"
        ),
    ],
)
def test_faults(folder, row, expected):
    with pytest.raises(DataError) as caught:
        sample(folder, {"solution": "x"} | row, "{question}")
    assert str(caught.value).startswith(f"rows:1: {expected}")
