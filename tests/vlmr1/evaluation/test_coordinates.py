"""Predicted boxes in pixels of the upright file, whatever a family writes and its processor makes of the image."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.families import build
from vlmr1.data.image_grid import PatchGrid
from vlmr1.errors import SettingError
from vlmr1.evaluation.decode import Decoder
from vlmr1.evaluation.records import Record
from vlmr1.evaluation.tasks import score_task
from vlmr1.models import load_model, load_processor
from vlmr1.types import Completion, Group, Sample

TRUE = (10.0, 20.0, 90.0, 60.0)


def write(path: Path, size: tuple[int, int], orientation: int = 1) -> Path:
    """A file whose pixels have this size before they are turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def sample(image, box=TRUE) -> Sample:
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}
    return Sample([message], (image,), json.dumps(list(box)), "data.jsonl:1", 0)


def record_of(model, processor, image, coordinates="auto") -> Record:
    """The record of an empty completion."""
    decoder = Decoder(model, processor, max_completion_length=4, box_coordinates=coordinates)
    prompt = decoder.builder(sample(image))
    ids = prompt.input_ids[:0]
    return decoder.record(Group(prompt, (Completion(ids, None, None, "", "stop"),)), 0)


def mean_iou(record: Record, image, written, box=TRUE) -> float:
    """The score of a completion that writes this box."""
    text = f"<think>a</think><answer>{json.dumps(list(written))}</answer>"
    said = Record(0, record.source, (), text, "stop", record.image_size, record.box_extent)
    value = score_task("rec", [sample(image, box)], [said]).metrics["mean_iou"].value
    assert value is not None
    return value


def test_a_resized_image(model, processor, tmp_path):
    """600 x 400 px are more than the tiny processor takes: the model sees, and writes, another size."""
    image = write(tmp_path / "large.png", (600, 400))
    record = record_of(model, processor, image)
    assert record.image_size == (600, 400)
    assert record.box_extent == PatchGrid.of(processor.image_processor).resized((600, 400)) == (532, 364)
    written = [TRUE[i] * (532, 364)[i % 2] / (600, 400)[i % 2] for i in range(4)]
    assert mean_iou(record, image, written) == pytest.approx(1.0, abs=1e-12)
    assert mean_iou(record, image, TRUE) < 0.8
    as_written = record_of(model, processor, image, "original")
    assert as_written.box_extent == (600, 400)
    assert mean_iou(as_written, image, TRUE) == 1.0 and mean_iou(as_written, image, written) < 0.8


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_turned_image_is_measured_upright(orientation, model, processor, tmp_path):
    """The file of 600 x 400 is looked at as 400 x 600 where its orientation says so."""
    image = write(tmp_path / "turned.png", (600, 400), orientation)
    record = record_of(model, processor, image)
    turned = orientation == 6
    assert record.image_size == ((400, 600) if turned else (600, 400))
    assert record.box_extent == ((364, 532) if turned else (532, 364))


def test_an_enlarged_image_keeps_the_pixels_of_its_file(model, processor, tmp_path):
    """14 px are enlarged to 28 before the processor makes 56 of them."""
    image = write(tmp_path / "small.png", (14, 14))
    record = record_of(model, processor, image)
    assert (record.image_size, record.box_extent) == ((14, 14), (56, 56))
    assert mean_iou(record, image, (8, 8, 24, 24), box=(2, 2, 6, 6)) == 1.0


FAMILIES = {"qwen3_vl": (1000, 1000), "glm4v": (1000, 1000), "internvl": (1000, 1000), "idefics3": (75, 133)}


@pytest.mark.parametrize("family, extent", FAMILIES.items(), ids=FAMILIES)
def test_families(family, extent, tmp_path):
    folder = build(family, tmp_path / family)
    model, processor = load_model(folder), load_processor(folder)
    image = write(tmp_path / "odd.png", (75, 133))
    assert record_of(model, processor, image).box_extent == extent
    if family in ("internvl", "idefics3"):
        with pytest.raises(SettingError, match="box_coordinates is resized, but"):
            record_of(model, processor, image, "resized")
    else:
        record = record_of(model, processor, image, "resized")
        assert record.box_extent == PatchGrid.of(processor.image_processor).resized((75, 133))
