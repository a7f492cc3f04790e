"""Images by name, in archives, out of their folder, and encoded in the row."""

import base64
import io
import pickle
import tarfile
import zipfile
from multiprocessing import get_context
from pathlib import Path

import pytest
from PIL import Image

from tests.data.formats import make
from tests.helpers.pictures import encoded
from vlmr1.cli import main
from vlmr1.data.folder import ImageFolder
from vlmr1.data.formats import DEFAULT, Columns
from vlmr1.data.images import open_image
from vlmr1.data.rows import ListRows
from vlmr1.data.samples import Samples
from vlmr1.data.sources import open_sources
from vlmr1.errors import DataError, SettingError
from vlmr1.types import ImageBytes

PNG, OTHER = encoded(colour=(1, 2, 3)), encoded(colour=(4, 5, 6))
FREE = Columns(images_outside=True)


def samples(folder, value, columns=DEFAULT, name="image"):
    rows = ListRows("rows", [{"prompt": "Q", "solution": "x", name: value}])
    return Samples([(rows, ImageFolder(folder))], "{question}", columns)


def image(folder, value, columns=DEFAULT, name="image"):
    (found,) = samples(folder, value, columns, name)[0].images
    return found


def data(folder, value, columns=DEFAULT):
    found = image(folder, value, columns)
    return found.read_bytes() if isinstance(found, Path) else found.data


def fault(folder, value, columns=DEFAULT):
    with pytest.raises(DataError) as caught:
        image(folder, value, columns)
    return caught.value.kind, str(caught.value).removeprefix("rows:1: ")


ENCODED = {
    "base64": lambda png: png,
    "base64 in lines": lambda png: f"{png[:40]}\n{png[40:]}\n",
    "data URI": lambda png: f"data:image/png;base64,{png}",
    "data URI of a part": lambda png: {"url": f"DATA:image/png;charset=x;base64,{png}", "detail": "low"},
    "quoted data URI": lambda png: "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    "dict": lambda png: {"bytes": png, "path": "a.png"},
    "dict of a dict": lambda png: {"image": {"bytes": None, "image_url": {"url": f"data:image/png;base64,{png}"}}},
}


@pytest.mark.parametrize("write", ENCODED.values(), ids=ENCODED)
def test_encoded_images(tmp_path, write):
    assert data(tmp_path, write(base64.b64encode(PNG).decode())) == PNG


VALUES = {  # and the name of the image; None: of a file
    "name": ("a.png", None),
    "path": ({"path": "a.png"}, None),
    "struct of a file": ({"bytes": None, "path": "a.png"}, None),
    "bytes": (PNG, "1 of rows:1"),
    "struct": ({"bytes": PNG, "path": None}, "1 of rows:1"),
    "named struct": ({"bytes": PNG, "path": "cat.png"}, "cat.png"),
    "open": (Image.open(io.BytesIO(PNG)), "1 of rows:1"),
}


@pytest.mark.parametrize("value, name", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("column", ["image", "images"])
def test_images_of_a_row(tmp_path, value, name, column):
    (tmp_path / "a.png").write_bytes(PNG)
    found = image(tmp_path, [value] if column == "images" else value, name=column)
    assert found == tmp_path / "a.png" if name is None else isinstance(found, ImageBytes) and found.name == name
    assert open_image(found, "x").tobytes() == bytes([1, 2, 3]) * 40 * 30


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_base64_of_any_file(tmp_path, kind):
    Image.new("RGB", (40, 30)).save(tmp_path / "a", kind)
    content = (tmp_path / "a").read_bytes()
    assert data(None, base64.b64encode(content).decode()) == content


@pytest.fixture
def archives(tmp_path):
    """A ZIP and a TAR file with two images each; the TAR file has a link to a file beside it too."""
    (tmp_path / "secret.png").write_bytes(PNG)
    members = {"a.png": PNG, "./sub/b.png": OTHER}
    with zipfile.ZipFile(tmp_path / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for name, content in members.items():
            (tmp_path / "member").write_bytes(content)
            archive.add(tmp_path / "member", name)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "../secret.png"
        archive.addfile(link)
    return tmp_path


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_images_of_an_archive(archives, kind):
    path = archives / f"images.{kind}"
    assert data(path, "a.png") == PNG
    assert data(path, "sub/../sub/b.png") == data(archives, f"images.{kind}/sub/b.png") == OTHER
    assert str(image(path, "a.png")) == f"{path}/a.png"
    for name in ("c.png", "../secret.png", "sub", "link.png", "/a.png"):
        assert fault(path, name) == ("missing image", f"image {name} is missing in {path}")
    assert fault(archives / "sub", f"../images.{kind}/a.png")[0] == "image outside"


def test_archives_are_read_in_forked_workers(archives):
    """A position that processes shared would mix up what they read."""
    folder = archives / "images.zip"
    assert data(folder, "a.png") == PNG
    made = pickle.loads(pickle.dumps(samples(folder, "sub/b.png")))
    with get_context("fork").Pool(2) as pool:
        found = pool.map(made.__getitem__, [0] * 64)
    assert {each.images[0].data for each in found} == {OTHER}


def test_archives_that_cannot_be_read(archives):
    content = bytearray((archives / "images.zip").read_bytes())
    (archives / "cut.zip").write_bytes(content[:-60])
    content[45] ^= 255  # of the compressed data
    (archives / "flipped.zip").write_bytes(content)
    (archives / "no.tar").write_bytes(b"x" * 600)
    for name in ("cut.zip", "flipped.zip", "no.tar"):
        assert fault(archives / name, "a.png")[0] == fault(archives, f"{name}/a.png")[0] == "archive"
    (archives / "images.tar.gz").write_bytes(b"")
    (archives / "rows.jsonl").write_text("{}")
    with pytest.raises(SettingError, match=r"images\.tar\.gz is not a directory, nor a \.zip or \.tar file"):
        open_sources([archives / "rows.jsonl"], [archives / "images.tar.gz"])


def test_a_check_of_an_archive(capsys):
    folder = Path(make.__file__).parent
    command = ["data", "check", str(folder / "llama-factory.json"), "--images", str(folder / "images.zip")]
    assert main(command) == 0
    assert "3 of 3 rows have images\n3 rows, 2 images: no faults\n" in capsys.readouterr().out


@pytest.fixture
def outside(tmp_path):
    """A folder with a link to an image beside it."""
    (tmp_path / "images").mkdir()
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "a.png")
    return tmp_path


@pytest.mark.parametrize("name", ["{}/a.png", "../a.png", "link.png", "file://{}/a.png"])
def test_names_that_leave_the_folder(outside, name):
    folder, filled = outside / "images", name.format(outside)
    kind, message = fault(folder, filled)
    assert kind == "image outside" and "images_outside_folders=true" in message
    assert image(folder, {"path": filled}, FREE) == outside / "a.png"


def test_absolute_names(outside):
    name = str(outside / "a.png")
    assert image(Path("/"), name) == outside / "a.png"
    assert image(None, name, FREE) == outside / "a.png"
    assert fault(None, name) == ("missing image", f"image {name} is a file name, and image_folders names no folder")
    assert fault(None, "a.png", FREE)[0] == "missing image"
    assert fault(outside / "images", str(outside / "b.png"), FREE)[0] == "missing image"


def test_the_setting_on_the_command_line(outside, capsys):
    (outside / "rows.jsonl").write_text('{"prompt": "Q", "solution": "x", "image": "link.png"}')
    words = ["data", "check", str(outside / "rows.jsonl"), "--images", str(outside / "images")]
    assert main(words) == 1
    assert "images_outside_folders=true" in capsys.readouterr().out
    assert main([*words, "--images_outside_folders"]) == main([*words, "--images_outside_folders", "true"]) == 0


def test_long_names_are_cut(tmp_path):
    kind, message = fault(tmp_path, "a" * 5000)
    assert (kind, len(message) < 400) == ("missing image", True)
