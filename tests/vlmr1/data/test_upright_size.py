"""The size of an image by its header is that of the decoded image, before it is enlarged."""

import io

import pytest
from PIL import ExifTags, Image

from vlmr1.data.images import encode_image, to_rgb, upright_size
from vlmr1.errors import DataError
from vlmr1.types import ImageBytes


def encoded(kind, orientation, mode="RGB"):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.new(mode, (40, 30)).save(buffer, kind, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_by_format_and_orientation(kind, orientation, tmp_path):
    data = encoded(kind, orientation)
    path = tmp_path / "image"
    path.write_bytes(data)
    expected = (40, 30) if orientation < 5 else (30, 40)
    with Image.open(path) as image:
        assert to_rgb(image).size == expected
    assert upright_size(path, "here:1") == upright_size(ImageBytes.of(data, "x"), "here:1") == expected


def test_small_images_have_their_own_size():
    assert upright_size(encode_image(Image.new("L", (3, 5)), "x"), "here:1") == (3, 5)


def test_a_file_that_is_no_image(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"no image")
    for image in (path, ImageBytes.of(b"no image", "bytes of a row")):
        with pytest.raises(DataError, match=r"^here:9: image .* cannot be decoded: "):
            upright_size(image, "here:9")
