"""Box coordinates: there and back, known numbers, and the size that the image processors make."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlmr1.data.box_coordinates import SPACES
from vlmr1.data.boxes import box_fault, scale_between, scale_box
from vlmr1.data.image_grid import PatchGrid
from vlmr1.data.images import enlarged
from vlmr1.models import BY_TYPE

SIDE = st.integers(1, 20_000)
NUMBER = st.floats(-1e6, 1e6)
PROCESSORS = {
    "qwen2_vl": Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}),
    "qwen3_vl": Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 64}),
    "glm4v": Glm4vImageProcessorPil(size={"shortest_edge": 2 * 56 * 56, "longest_edge": 2 * 28 * 28 * 64}),
}


def test_every_family_has_its_coordinates():
    assert SPACES.keys() == BY_TYPE.keys()


@given(box=st.tuples(NUMBER, NUMBER, NUMBER, NUMBER), size=st.tuples(SIDE, SIDE), extent=st.tuples(SIDE, SIDE))
@example(box=(0.0, 0.0, 640.0, 427.0), size=(640, 427), extent=(644, 420))
@example(box=(1.0, 2.0, 3.0, 4.0), size=(640, 427), extent=(640, 427))
def test_there_and_back(box, size, extent):
    there_and_back = scale_box(scale_box(box, scale_between(extent, size)), scale_between(size, extent))
    np.testing.assert_allclose(there_and_back, box, rtol=1e-9, atol=1e-300)
    assert scale_box(box, None) == box == scale_box(box, scale_between(size, size))


@pytest.mark.parametrize("name", PROCESSORS)
@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 500), height=st.integers(1, 500))
@example(width=28, height=28)
@example(width=41, height=43)
@example(width=500, height=3)
def test_the_size_is_that_of_the_processor(name, width, height):
    processor = PROCESSORS[name]
    image = enlarged(Image.new("RGB", (width, height)))
    if max(image.size) > 200 * min(image.size):
        with pytest.raises(ValueError, match="aspect ratio"):
            PatchGrid.of(processor).resized(image.size)
        return
    _, rows, columns = processor(images=[image], return_tensors="np")["image_grid_thw"][0] * processor.patch_size
    assert PatchGrid.of(processor).resized(image.size) == (columns, rows)


WIDE = [(600, 300)]
FAULTS = {  # box, sizes of the images, what the fault says; None: a possible box
    "fractions": ((0.1, 0.2, 0.5, 0.6), WIDE, "in fractions of 1"),
    "fractions of the whole image": ((0, 0, 1, 1), WIDE, "in fractions of 1"),
    "fractions without an image": ((0.1, 0.2, 0.5, 0.6), [], "in fractions of 1"),
    "a line": ((10, 10, 10.5, 40), WIDE, "smaller than a pixel"),
    "x": ((50, 10, 20, 40), WIDE, "x2 is below x1: perhaps it is x, y, width, height"),
    "y": ((50, 100, 90, 40), WIDE, "y2 is below y1: perhaps it is x, y, width, height"),
    "thousandths": ((500, 500, 600, 600), WIDE, "600 x 300 px by more than 2 px: perhaps it is in thousandths"),
    "another size": ((100, 100, 1500, 290), WIDE, "of the image at another size"),
    "turned": ((10, 350, 200, 590), WIDE, "turned by 90 degrees"),
    "negative": ((-10, 0, 50, 50), WIDE, "negative"),
    "three px outside": ((0, 0, 603, 300), WIDE, "leaves the image"),
    "neither of two": ((0, 0, 500, 500), [(600, 300), (300, 600)], "leaves the image of 600 x 300"),
    "two px outside": ((-2, -1.5, 602, 301.9), WIDE, None),
    "a pixel": ((5, 5, 6, 6), WIDE, None),
    "the second image": ((10, 350, 200, 590), [(600, 300), (300, 600)], None),
    "no image": ((0, 0, 5000, 5000), [], None),
}


@pytest.mark.parametrize(("box", "sizes", "says"), FAULTS.values(), ids=FAULTS.keys())
def test_impossible_boxes(box, sizes, says):
    found = box_fault(box, sizes, pixels=True)
    assert (says is None and found is None) or says in found
    otherwise = box_fault(box, sizes, pixels=False)  # corners in the wrong order are wrong in any coordinates
    assert otherwise == (found if says and "is below" in says else None)
