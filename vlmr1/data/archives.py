"""Images inside ZIP and TAR files, read without unpacking."""

from __future__ import annotations

import os
import posixpath
import tarfile
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

SUFFIXES = (".zip", ".tar")
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, NotImplementedError)
UNREADABLE += (zipfile.BadZipFile, tarfile.TarError, zlib.error)


def is_archive(path: str | Path) -> bool:
    """Return whether this is a ZIP file, or a TAR file without compression, by its name."""
    return str(path).lower().endswith(SUFFIXES) and os.path.isfile(path)


def read_member(archive: str, name: str) -> bytes | None:
    """Return the content of a file in an archive; None where there is none. Raises `UNREADABLE`."""
    name = posixpath.normpath(name)
    if archive.lower().endswith(".tar"):
        place = _tar_index(archive).get(name)
        if place is None:
            return None
        with open(archive, "rb") as file:
            file.seek(place[0])
            return file.read(place[1])
    opened, names = _zip_index(archive, os.getpid())
    return opened.read(names[name]) if name in names else None


@lru_cache(maxsize=16)
def _tar_index(archive: str) -> dict[str, tuple[int, int]]:
    """Offset and size of each file."""
    with tarfile.open(archive, "r:") as opened:
        return {posixpath.normpath(each.name): (each.offset_data, each.size) for each in opened if each.isreg()}


@lru_cache(maxsize=16)
def _zip_index(archive: str, process: int) -> tuple[zipfile.ZipFile, dict[str, str]]:
    """The opened archive, and its own names by normal ones. A forked process opens it anew: a file has one position."""
    opened = zipfile.ZipFile(archive)
    return opened, {posixpath.normpath(name): name for name in opened.namelist() if not name.endswith("/")}
