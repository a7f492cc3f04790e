"""Boxes as a family writes them, scored against boxes in pixels of the image file."""

import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.helpers.families import FAMILIES, build
from tests.helpers.pictures import encoded
from tests.helpers.rewards import answered, group, sample, values
from vlmr1.data.box_coordinates import SPACES, BoxCoordinates
from vlmr1.data.boxes import box_fault, scale_between, scale_box
from vlmr1.data.prompts import PromptBuilder
from vlmr1.errors import DataError, RewardError, SettingError
from vlmr1.models import family_of, load_model, load_processor
from vlmr1.rewards import RewardSettings, check_samples, get_reward, score, score_groups
from vlmr1.rewards.methods import CONVERTED
from vlmr1.tiny import CHECKPOINT, digits
from vlmr1.types import ImageBytes

IMAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}]
LABELLED = ("map", "od_ap", "od_ap50", "odLength", "weighted_sum")
PHOTO = ImageBytes.of(encoded((640, 480)), "image")
RIGHT = "[0, 0, 320, 480]"  # its left half
QWEN = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64})


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = build(request.param, tmp_path_factory.mktemp("coordinates") / request.param)
    model, processor = load_model(folder), load_processor(folder)
    builder = PromptBuilder(model, family_of(model), processor)
    return SimpleNamespace(name=request.param, builder=builder, image_processor=processor.image_processor)


def boxes_of(name, image_processor, **options):
    return RewardSettings(**options).with_boxes("auto", name, image_processor)


SIXTEENTHS = st.integers(0, 15)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(1, 260), st.integers(1, 260)),
    orientation=st.integers(1, 8),
    corner=st.tuples(SIXTEENTHS, SIXTEENTHS),
    kind=st.sampled_from(["PNG", "JPEG"]),
    as_bytes=st.booleans(),
)
@example(size=(112, 168), orientation=1, corner=(0, 0), kind="PNG", as_bytes=False)  # not resized by patch grids
@example(size=(75, 133), orientation=6, corner=(3, 8), kind="JPEG", as_bytes=False)  # turned
@example(size=(9, 21), orientation=1, corner=(1, 1), kind="PNG", as_bytes=True)  # enlarged to 28 first
@example(size=(251, 47), orientation=8, corner=(15, 15), kind="JPEG", as_bytes=True)
def test_a_box_in_the_familys_coordinates_is_right(family, tmp_path_factory, size, orientation, corner, kind, as_bytes):
    """A true box in pixels of the upright file, written by a model in its own coordinates, has IoU 1."""
    assume(max(size) <= 50 * min(size))
    data = encoded(size, kind=kind, orientation=orientation)
    image = ImageBytes.of(data, "image")
    if not as_bytes:
        image = tmp_path_factory.mktemp("file") / f"image.{kind.lower()}"
        image.write_bytes(data)
    upright = size[::-1] if orientation >= 5 else size
    (left, top), (w, h) = corner, upright
    true = (left / 16 * w, top / 16 * h, w, h)
    assume(box_fault(true, [upright], pixels=True) is None)  # smaller than a pixel
    row = replace(sample(1, "", [image]), messages=IMAGE)
    prompt = family.builder(row)
    extent = {"original": upright, "thousand": (1000, 1000)}.get(SPACES[family.name])
    if extent is None:
        grid = prompt.images[0]["image_grid_thw"][0] * family.builder.model.config.vision_config.patch_size
        extent = grid[2].item(), grid[1].item()
    written = list(scale_box(true, scale_between(upright, extent)))
    for method in CONVERTED:
        said, right = ({"bbox_2d": list(box), "label": "cat"} for box in (written, true))
        if method in LABELLED:
            said, right = [said], [right]
        made = replace(prompt, sample=replace(row, solution=json.dumps(right), columns={"accu_reward_method": method}))
        groups = [replace(group(row, answered(json.dumps(said))), prompt=made)]
        names = ["accuracy", method] if method in ("iou", "point_in_box") else ["accuracy"]
        rewards = [get_reward(name, boxes_of(family.name, family.image_processor)) for name in names]
        check_samples(rewards, [made.sample])
        assert values(score_groups(groups, rewards)) == [[[pytest.approx(1, abs=1e-6)] * len(names)]], method


def scored(box, solution, coordinates, images, grids=(), method="iou", **columns):
    """The reward accuracy of one completion with this box."""
    row = sample(1, solution, images, accu_reward_method=method, **columns)
    inputs = [{"image_grid_thw": torch.tensor([grid])} for grid in grids] or [{}] * len(images)
    reward = get_reward("accuracy", RewardSettings(boxes=coordinates))
    ((value,),) = values(score_groups([group(row, answered(json.dumps(box)), images=inputs)], [reward]))
    return value[0]


@pytest.mark.parametrize(
    "space, processor, grid, box, expected",
    [
        ("resized", QWEN, [1, 10, 20], [0, 0, 140, 140], 1),  # 280 x 140 of 640 x 480: the left half
        ("resized", QWEN, [1, 10, 20], [0, 0, 320, 480], 320 * 480 / (640 / 280 * 320 * 480 / 140 * 480)),
        ("resized", Qwen2VLImageProcessorPil(patch_size=16), [1, 10, 20], [0, 0, 160, 160], 1),
        ("thousand", QWEN, [1, 10, 20], [0, 0, 500, 1000], 1),
        ("thousand", QWEN, [1, 10, 20], [0, 0, 320, 480], 0.64 * 0.48),
        ("original", QWEN, [1, 10, 20], [0, 0, 320, 480], 1),
        ("original", QWEN, [1, 10, 20], [0, 0, 160, 480], 0.5),
    ],
)
def test_known_numbers(space, processor, grid, box, expected):
    coordinates = BoxCoordinates.of(space, "qwen2_5_vl", processor)
    assert scored(box, RIGHT, coordinates, [PHOTO], [grid]) == pytest.approx(expected, rel=1e-6)


def test_points_are_converted_too():
    thousand = BoxCoordinates("thousand")
    for point, expected in (([400, 400], 1), ([600, 400], 0), ({"point_2d": [499, 1]}, 1), ([0, 0, 900, 900], 1)):
        assert scored(point, RIGHT, thousand, [PHOTO], method="point_in_box") == expected


@pytest.mark.parametrize("method", ["iou_internvl", "iou_glm", "iou_qwen"])
def test_methods_of_a_family_do_as_they_say(method):
    """No second conversion: iou_qwen has its own, by patches of 14; the others compare as it stands."""
    box = [0, 0, 140, 140] if method == "iou_qwen" else [0, 0, 320, 480]
    for coordinates in (BoxCoordinates(), BoxCoordinates("thousand"), BoxCoordinates.of("resized", "qwen2_vl", QWEN)):
        value = scored(box, RIGHT, coordinates, [PHOTO], [[1, 10, 20]], method=method)
        assert value == pytest.approx(1, rel=1e-6)
    options = {"image_grid_thw": [1, 10, 20], "image_size": [640, 480], "box_scale": (9.0, 9.0)}
    for name in ("accuracy", method):
        value = score(name, answered(json.dumps(box)), RIGHT, accu_reward_method=method, **options)
        assert value == pytest.approx(1, rel=1e-12)


def test_the_length_reward_asks_the_same_accuracy():
    for space, correct in (("thousand", True), ("original", False)):
        row = sample(1, RIGHT, [PHOTO], accu_reward_method="iou")
        reward = get_reward("length", RewardSettings(boxes=BoxCoordinates(space)))
        ((value,),) = values(score_groups([group(row, answered("[0, 0, 500, 1000]"), images=[{}])], [reward]))
        assert (value[0] > 0) is correct


def test_a_column_of_the_rows_own_is_not_taken_for_the_scale():
    for space, box in (("original", [0, 0, 320, 480]), ("thousand", [0, 0, 500, 1000])):
        value = scored(box, RIGHT, BoxCoordinates(space), [PHOTO], box_scale=[9, 9])
        assert value == pytest.approx(1, rel=1e-6)


def test_the_published_mode_converts_nothing():
    assert boxes_of("qwen2_5_vl", QWEN, mode="vlm_r1") == RewardSettings(mode="vlm_r1")
    with pytest.raises(SettingError, match="boxes are thousand with reward_mode vlm_r1"):
        RewardSettings(mode="vlm_r1", boxes=BoxCoordinates("thousand"))
    solution = "<answer>[0, 0, 320, 480]</answer>"
    value = score("iou", answered(RIGHT), solution, mode="vlm_r1", box_scale=(9.0, 9.0))
    assert value == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_auto_is_the_familys(name):
    coordinates = BoxCoordinates.of("auto", name, FAMILIES[name].image_processor())
    assert coordinates.space == SPACES[name] and (coordinates.grid is not None) == (coordinates.space == "resized")


def test_coordinates_that_a_model_cannot_have():
    internvl = FAMILIES["internvl"].image_processor()
    no_grid = "GotOcr2ImageProcessorPil does not resize images to a grid of merged patches"
    with pytest.raises(SettingError, match=f"^box_coordinates is resized, but {no_grid}"):
        BoxCoordinates.of("resized", "internvl", internvl)
    with pytest.raises(SettingError, match=r"^box_coordinates is auto, but it is not known how llava writes boxes"):
        BoxCoordinates.of("auto", "llava", internvl)
    assert BoxCoordinates.of("thousand", "llava", internvl).space == "thousand"


# Rows that have no one scale

SIZES = {"wide": (112, 56), "other": (140, 140), "odd": (75, 133), "turned": (56, 112)}
RESIZED = BoxCoordinates.of("resized", "qwen2_5_vl", QWEN)


def images(*names):
    return [ImageBytes.of(encoded(SIZES[name], orientation=6 if name == "turned" else 1), name) for name in names]


@pytest.mark.parametrize(
    "coordinates, names, reason",
    [
        pytest.param(BoxCoordinates("thousand"), ["wide", "wide"], None, id="same-size"),
        pytest.param(BoxCoordinates("thousand"), ["wide", "turned"], None, id="same-size-upright"),
        pytest.param(BoxCoordinates("thousand"), ["wide", "other"], "its 2 images have", id="two-sizes"),
        pytest.param(BoxCoordinates("thousand"), [], "it has no image", id="none"),
        pytest.param(RESIZED, ["wide", "other"], None, id="not-resized"),
        pytest.param(RESIZED, ["wide", "odd"], "its 2 images have different scales", id="one-resized"),
        pytest.param(RESIZED, [], "it has no image", id="none-resized"),
        pytest.param(BoxCoordinates(), ["wide", "odd"], None, id="original"),
        pytest.param(BoxCoordinates(), [], None, id="none-original"),
    ],
)
def test_rows_without_one_scale_are_found_before_training(coordinates, names, reason):
    """Before training by the sizes that the processor will make, in training by those that it made."""
    settings = RewardSettings(boxes=coordinates)
    row = sample(7, "[0, 0, 28, 28]", images(*names))
    pictures = [Image.open(io.BytesIO(each.data)) for each in row.images]
    sizes = [QWEN([np.asarray(each.convert("RGB"))], return_tensors="pt") for each in pictures]
    groups = [group(row, answered("[0, 0, 1, 1]"), images=[dict(each) for each in sizes])]
    other = replace(row, solution="A", columns={"accu_reward_method": "mcq"})  # no boxes: any images will do
    check_samples(["accuracy", "length", "format"], [other], settings)
    for name in ("iou", "point_in_box", "accuracy", "length"):
        reward = get_reward(name, settings)
        if reason is None:
            check_samples([reward], [row])
            score_groups(groups, [reward])
            continue
        with pytest.raises(DataError, match=rf"^data\.jsonl:7: {reason}.*box_coordinates=original"):
            check_samples([reward], [row])
        with pytest.raises(RewardError, match=reason):
            score_groups(groups, [reward])


def test_an_image_that_the_processor_refuses():
    row = sample(3, "[0, 0, 9, 9]", [ImageBytes.of(encoded((28, 6000)), "thin")] * 2)
    with pytest.raises(DataError, match=r"^data\.jsonl:3: the processor refuses the row: absolute aspect ratio"):
        check_samples(["iou"], [row], RewardSettings(boxes=RESIZED))


# The embedded data


def test_the_embedded_digits_are_not_resized(tmp_path):
    """So a scale of 1 leaves their rewards what they were, bit for bit."""
    processor = load_processor(CHECKPOINT)
    model = load_model(CHECKPOINT)
    builder = PromptBuilder(model, family_of(model), processor)
    coordinates = BoxCoordinates.of("auto", model.config.model_type, processor.image_processor)
    rewards = [get_reward("accuracy", RewardSettings(boxes=boxes)) for boxes in (coordinates, BoxCoordinates())]
    rng = np.random.default_rng(0)
    for size in digits.CANVAS:
        image = ImageBytes.of(encoded((size, size)), "canvas")
        row = replace(sample(1, "[14, 28, 70, 84]", [image]), messages=IMAGE)
        prompt = builder(row)
        assert coordinates.scale(prompt) == (1.0, 1.0)
        texts = [answered(json.dumps(rng.uniform(0, 100, 4).tolist())) for _ in range(20)]
        ((*pairs,),) = values(score_groups([replace(group(row, *texts), prompt=prompt)], rewards))
        assert any(one > 0 for one, _ in pairs) and all(one == other for one, other in pairs)


@given(box=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=4, max_size=4))
@example(box=[-1.7e308, -1.7e308, 1.7e308, 1.7e308])
@example(box=[1.7e308, 5.0, 1.7e308, 5.0])
@settings(deadline=None)
def test_whatever_a_completion_says_it_is_scored(box):
    labelled = json.dumps([{"bbox_2d": box, "label": "cat"}])
    for method in CONVERTED:
        said = labelled if method in LABELLED else json.dumps(box)
        right = '[{"bbox_2d": [0, 0, 9, 9], "label": "cat"}]' if method in LABELLED else "[0, 0, 9, 9]"
        value = score("accuracy", answered(said), right, accu_reward_method=method, box_scale=(3.0, 0.5))
        assert 0 <= value <= 1
