"""Pixels and tiles that a model sees of an image: bounds that hold, are saved, or are refused."""

import math
import shutil

import pytest
from PIL import Image

from tests.helpers.families import FAMILIES, build
from vlmr1.data.image_limits import limit_images
from vlmr1.errors import SettingError
from vlmr1.models.processor import load_processor, save_processor

GRIDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
TILES = ("internvl", "idefics3", "smolvlm")
SIDE = 28  # px of a merged patch


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: build(name, tmp_path_factory.mktemp("limits") / name) for name in FAMILIES}


def area(processor, size):
    grid = processor.image_processor([Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"]
    return math.prod((grid[0, 1:] * processor.image_processor.patch_size).tolist())


@pytest.mark.parametrize("name", GRIDS)
def test_the_area_stays_between_the_bounds_also_after_saving(name, folders, tmp_path):
    """The greatest area of whole merged patches below the most, and the least above the least."""
    processor = load_processor(folders[name])
    assert area(processor, (280, 280)) == 224 * 224 and area(processor, (28, 28)) == 56 * 56  # the checkpoint's own
    limit_images(processor, name, min_pixels=84 * 84, max_pixels=112 * 112)
    save_processor(processor, tmp_path)
    shutil.copy(folders[name] / "config.json", tmp_path)
    for each in (processor, load_processor(tmp_path)):
        assert area(each, (280, 280)) == 112 * 112 and area(each, (28, 28)) == 84 * 84
        assert area(each, (112, 84)) == 112 * 84  # between them


@pytest.mark.parametrize("name", GRIDS)
def test_one_bound_leaves_the_other(name, folders):
    processor = load_processor(folders[name])
    limit_images(processor, name, max_pixels=SIDE * SIDE * 9)
    assert area(processor, (280, 280)) == SIDE * SIDE * 9 and area(processor, (28, 28)) == 56 * 56
    with pytest.raises(SettingError, match=r"^max_pixels is 784: min_pixels, 3136, is above max_pixels, 784$"):
        limit_images(load_processor(folders[name]), name, max_pixels=784)
    with pytest.raises(SettingError, match=r"^min_pixels is 99999: min_pixels, 99999, is above max_pixels, 50176$"):
        limit_images(load_processor(folders[name]), name, min_pixels=99999)


@pytest.mark.parametrize(
    "size, most, expected",
    [((112, 112), None, 5), ((112, 112), 4, 5), ((112, 112), 3, 1), ((112, 56), 2, 3), ((112, 56), 1, 1)],
)
def test_internvl_makes_no_more_tiles(size, most, expected, folders, tmp_path):
    """Tiles of 56 px in the image's shape, then a thumbnail: 2 x 2 for a square, or one and none."""
    processor = load_processor(folders["internvl"])
    limit_images(processor, "internvl", max_anyres_num=most)
    save_processor(processor, tmp_path)
    shutil.copy(folders["internvl"] / "config.json", tmp_path)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], tokenize=False, add_generation_prompt=True
    )
    for each in (processor, load_processor(tmp_path)):
        inputs = each(text=[text], images=[Image.new("RGB", size)], return_tensors="pt")
        assert len(inputs["pixel_values"]) == expected
        assert int((inputs["input_ids"] == each.image_token_id).sum()) == 4 * expected


AREA, NUMBER = "does not resize images to a grid", "has no number of tiles$"
REFUSED = [(name, setting, AREA) for name in TILES for setting in ("min_pixels", "max_pixels")]
REFUSED += [(name, "max_anyres_num", NUMBER) for name in (*GRIDS, *TILES) if name != "internvl"]


@pytest.mark.parametrize("name, setting, says", REFUSED)
def test_limits_that_a_family_does_not_have(name, setting, says, folders):
    with pytest.raises(SettingError, match=rf"^{setting} cannot be set for {name}: .* {says}"):
        limit_images(load_processor(folders[name]), name, **{setting: 5000})
