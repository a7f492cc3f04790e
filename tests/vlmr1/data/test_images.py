"""Images of every kind -> RGB: the pixels, and what is refused."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.helpers.pictures import png_of
from vlmr1.data.faults import RowFault
from vlmr1.data.images import encode_image, enlarged_size, image_faults, open_image, upright_size
from vlmr1.types import ImageBytes

SIZE = (40, 30)


def saved(image, path, **options):
    image.save(path, **options)
    return open_image(path, "data.jsonl:3")


def half_and_half(size, left, right):
    """[H, W, 3]: the left half of one colour, the right half of another."""
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2], pixels[:, size[0] // 2 :] = left, right
    return pixels


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    """The file is stored turned; every viewer shows red, green, blue, white from the upper left, row by row."""
    corners = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
    upright = corners.repeat(32, 0).repeat(48, 1)  # [64, 96, 3]
    stored = {
        1: upright,
        2: np.fliplr(upright),
        3: np.rot90(upright, 2),
        4: np.flipud(upright),
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if suffix in ("jpg", "webp") else {}
    path = tmp_path / f"a.{suffix}"
    image = saved(Image.fromarray(np.ascontiguousarray(stored)), path, exif=exif, **options)
    kept = encode_image(Image.open(path), "a")
    assert image.size == open_image(kept, "x:1").size == (96, 64)
    for each in (path, ImageBytes.of(path.read_bytes(), "a"), kept):  # by the header alone
        assert upright_size(each, "here:1") == (96, 64)
    seen = np.asarray(image)[[16, 16, 48, 48], [24, 72, 24, 72]].astype(int)  # [4, 3]
    assert np.abs(seen - corners.reshape(4, 3)).max() <= 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_unreadable_exif_does_not_matter(tmp_path):
    Image.new("RGB", SIZE, (1, 2, 3)).save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert open_image(tmp_path / "a.png", "x:1").getpixel((0, 0)) == (1, 2, 3)


def palette(transparent=None):
    image = Image.new("P", SIZE, 1)
    image.putpalette([255, 0, 0, 0, 0, 200])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


def grey16(value):
    return Image.fromarray(np.full((SIZE[1], SIZE[0]), value, np.uint16))


@pytest.mark.parametrize(
    "image, suffix, expected",
    [
        pytest.param(Image.new("1", SIZE, 1), "png", (255, 255, 255), id="1-bit"),
        pytest.param(Image.new("L", SIZE, 9), "png", (9, 9, 9), id="grey"),
        pytest.param(palette(), "png", (0, 0, 200), id="palette"),
        pytest.param(palette(), "gif", (0, 0, 200), id="gif"),
        pytest.param(palette(transparent=1), "png", (255, 255, 255), id="palette-transparent"),
        pytest.param(palette(transparent=0), "png", (0, 0, 200), id="palette-other-transparent"),
        pytest.param(palette(transparent=b"\xff\x80"), "png", (127, 127, 227), id="palette-half-transparent"),
        pytest.param(Image.new("LA", SIZE, (10, 128)), "png", (132, 132, 132), id="grey-alpha"),
        pytest.param(Image.new("RGBA", SIZE, (255, 0, 0, 0)), "png", (255, 255, 255), id="transparent"),
        pytest.param(Image.new("RGBA", SIZE, (255, 0, 0, 128)), "png", (255, 127, 127), id="half-transparent"),
        pytest.param(Image.new("RGBA", SIZE, (1, 2, 3, 255)), "png", (1, 2, 3), id="opaque"),
        pytest.param(Image.new("CMYK", SIZE, (0, 255, 255, 0)), "tiff", (255, 0, 0), id="cmyk"),
        pytest.param(Image.new("CMYK", SIZE, (255, 0, 255, 0)), "jpg", (0, 255, 0), id="cmyk-jpeg"),
        pytest.param(Image.new("YCbCr", SIZE, (100, 128, 128)), "jpg", (100, 100, 100), id="ycbcr"),
        pytest.param(grey16(257 * 77), "png", (77, 77, 77), id="16-bit"),
        pytest.param(grey16(257 * 200 + 129), "tiff", (201, 201, 201), id="16-bit-rounds"),
        pytest.param(grey16(65535), "png", (255, 255, 255), id="16-bit-white"),
        pytest.param(Image.new("I", SIZE, 257 * 5), "tiff", (5, 5, 5), id="32-bit"),
        pytest.param(Image.new("F", SIZE, 0.4), "tiff", (102, 102, 102), id="float"),
    ],
)
def test_modes(tmp_path, image, suffix, expected):
    options = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    opened = saved(image, tmp_path / f"a.{suffix}", **options)
    assert (opened.mode, opened.size) == ("RGB", SIZE)
    assert np.abs(np.asarray(opened).astype(int) - expected).max() <= (2 if suffix == "jpg" else 0)


def test_a_transparent_colour(tmp_path):
    pixels = half_and_half(SIZE, (9, 9, 9), (0, 0, 0))
    image = saved(Image.fromarray(pixels), tmp_path / "a.png", transparency=(9, 9, 9))
    assert np.array_equal(np.asarray(image), half_and_half(SIZE, (255, 255, 255), (0, 0, 0)))


@pytest.mark.parametrize(
    "image, expected",
    [
        (Image.new("I", SIZE, 70_000), "values from 70000 to 70000 in mode I, not 0 to 65535"),
        (Image.new("F", SIZE, -0.5), "values from -0.5 to -0.5 in mode F, not 0 to 1"),
        (Image.new("F", SIZE, float("nan")), "values from nan to nan in mode F, not 0 to 1"),
    ],
    ids=["32-bit", "negative", "nan"],
)
def test_unknown_ranges(tmp_path, image, expected):
    with pytest.raises(RowFault) as caught:
        saved(image, tmp_path / "a.tiff")
    assert str(caught.value) == f"data.jsonl:3: image {tmp_path}/a.tiff cannot be decoded: {expected}"
    assert (caught.value.kind, caught.value.source) == ("image undecodable", "data.jsonl:3")


@pytest.mark.parametrize(
    "size, expected",
    [
        ((28, 28), (28, 28)),
        ((20, 20), (28, 28)),
        ((20, 50), (28, 70)),
        ((50, 20), (70, 28)),
        ((27, 400), (28, 414)),
        ((400, 29), (400, 29)),
        ((1, 3), (28, 84)),
        ((200, 28), (200, 28)),
    ],
)
def test_small_images_are_enlarged(tmp_path, size, expected):
    assert enlarged_size(size) == expected
    image = saved(Image.new("RGB", size, (4, 5, 6)), tmp_path / "a.png")
    assert image.size == expected and upright_size(tmp_path / "a.png", "here:1") == size
    assert np.array_equal(np.unique(np.asarray(image).reshape(-1, 3), axis=0), [[4, 5, 6]])


def dds_of_no_format():
    buffer = io.BytesIO()
    Image.new("RGB", SIZE).save(buffer, "DDS")
    return buffer.getvalue()[:80] + bytes(4) + buffer.getvalue()[84:]


@pytest.mark.parametrize(
    "content, kind, expected",
    [
        pytest.param(
            png_of(20_000, 20_000), "image too large", "Image size (400000000 pixels) exceeds limit", id="bomb"
        ),
        pytest.param(png_of(30, 40), "image undecodable", "image file is truncated", id="no-pixels"),
        pytest.param(b"", "image undecodable", "cannot identify image file", id="empty"),
        pytest.param(b"no image", "image undecodable", "cannot identify image file", id="text"),
        pytest.param(dds_of_no_format(), "image undecodable", "Unknown pixel format flags 0", id="not-implemented"),
    ],
)
def test_refused(tmp_path, content, kind, expected):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    for image, name in ((path, path), (ImageBytes.of(content, "2 of d.parquet:9"), "2 of d.parquet:9")):
        for read in (open_image, upright_size)[: 2 if "identify" in expected else 1]:  # the header may be whole
            with pytest.raises(RowFault) as caught:
                read(image, "data.jsonl:9")
            assert str(caught.value).startswith(f"data.jsonl:9: image {name} cannot be decoded: {expected}")
            assert caught.value.kind == kind


def test_too_large_after_enlarging(tmp_path):
    with warnings.catch_warnings(), pytest.raises(RowFault) as caught:
        warnings.simplefilter("error")
        saved(Image.new("1", (1, 300_000)), tmp_path / "thin.png")
    assert str(caught.value).endswith("1 x 300000 px enlarged to 28 x 8400000")
    assert caught.value.kind == "image too large"


@pytest.mark.parametrize("mode", ["RGB", "LA", "P", "CMYK", "F"])
def test_bytes_and_open_images_are_what_a_file_is(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    if mode == "F":
        image = image.point(lambda value: value / 255)
    path = tmp_path / "a.tiff" if mode in ("CMYK", "F") else tmp_path / "a.png"
    image.save(path)
    encoded = ImageBytes.of(path.read_bytes(), "a")
    kept = encode_image(image, "a")
    expected = np.asarray(open_image(path, "x:1"))
    assert expected.std() > 50
    assert np.array_equal(np.asarray(open_image(encoded, "x:1")), expected)
    assert np.array_equal(np.asarray(open_image(kept, "x:1")), expected)


def test_equal_bytes_are_one_image():
    one, same, other = ImageBytes.of(b"abc", "1 of a:1"), ImageBytes.of(b"abc", "1 of a:2"), ImageBytes.of(b"abd", "x")
    assert {one: 1} | {same: 2} == {one: 2} and one != other
    assert (str(one), "abc" in repr(one)) == ("1 of a:1", False)


def test_faults_come_in_order_and_few_images_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmr1.data.images.IN_FLIGHT", 3)
    Image.new("L", SIZE).save(tmp_path / "good.png")
    good, given = tmp_path / "good.png", []

    def images():
        for i in range(9):
            given.append(i)
            yield (ImageBytes.of(b"%d" % i, str(i)) if i % 2 else good), f"d:{i}"

    faults = image_faults(images())
    assert next(faults) is None  # the good one
    assert len(given) == 4  # 0, 1, 3 wait; 2 is the image of 0
    assert [fault.source for fault in faults if fault] == ["d:1", "d:3", "d:5", "d:7"]
