"""Open data files by name, each with its image folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlmr1.data.archives import is_archive
from vlmr1.data.folder import ImageFolder
from vlmr1.data.hub import folder_rows, hub_rows, parquet_rows
from vlmr1.data.mixture import EVERYTHING, DataFile, Mixture, listed
from vlmr1.data.rows import Rows, json_rows
from vlmr1.errors import SettingError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
JOINT = re.compile(r":(?![^\[\]]*\])")  # except within a slice, as in train[:100]


def open_sources(
    data_file_paths: Sequence[str | Path], image_folders: Sequence[str | Path], mixture: Mixture = EVERYTHING
) -> list[tuple[Rows, ImageFolder]]:
    """Return the rows of each data file, in order, with its image folder.

    A data file is a JSON or Parquet file, a YAML list of data files, a directory written by `save_to_disk`
    (DIRECTORY@SPLIT where it has several splits), or a hub data set (OWNER/NAME@SPLIT). Several files or folders may be
    joined by ':'. There is one folder for all files, one for each, or none where rows hold their images; it may be a
    .zip or .tar file. `mixture` says which rows are taken. SettingError for a file or folder that does not exist.
    """
    files = mixture.files(split_paths(data_file_paths))
    if not files:
        raise SettingError("data_file_paths is empty: name at least one data file")
    places = image_places(files, image_folders)
    rows = mixture.select(files, [open_rows(file.name) for file in files])
    return list(zip(rows, places, strict=True))


def image_places(files: Sequence[DataFile], image_folders: Sequence[str | Path]) -> list[ImageFolder]:
    """Return the image folder of each file: its own, or that of `image_folders`."""
    folders = split_paths(image_folders)
    if len(folders) not in (0, 1, len(files)):
        raise SettingError(
            f"image_folders has {len(folders)} folders for {len(files)} data files: give one for all, or one for each"
        )
    for folder in [*folders, *(file.folder for file in files if file.folder is not None)]:
        if not Path(folder).is_dir() and not is_archive(folder):
            raise SettingError(f"image_folders: {folder} is not a directory, nor a .zip or .tar file")
    places = [ImageFolder(Path(folder)) for folder in folders] or [ImageFolder(None)]
    places *= len(files) if len(places) == 1 else 1
    own = [None if file.folder is None else ImageFolder(Path(file.folder)) for file in files]
    return [mine or place for mine, place in zip(own, places, strict=True)]


def open_rows(name: str) -> Rows:
    """Open one data file, directory or hub data set."""
    path = Path(name)
    base, _, split = name.partition("@")
    if path.is_file():
        return parquet_rows(path) if path.suffix.lower() == ".parquet" else json_rows(path)
    if path.is_dir() and is_saved(path):
        return folder_rows(path, None)
    if split and is_saved(Path(base)):
        return folder_rows(Path(base), split)
    if split and HUB_NAME.fullmatch(base):
        return hub_rows(base, split)
    raise SettingError(
        f"data_file_paths: {name} is not a file, nor a directory of save_to_disk, nor a hub data set with its split "
        "(OWNER/NAME@SPLIT)"
    )


def is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote this directory."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def split_names(names: Iterable[str | Path]) -> list[str]:
    """Return the names of all data files, those of YAML lists in place of the list."""
    return [file.name for name in split_paths(names) for file in listed(name)]


def split_paths(names: Iterable[str | Path]) -> list[str]:
    """Split names joined by ':'; a name that exists as a whole is not split."""
    return [
        part
        for name in map(str, names)
        for part in ([name] if os.path.exists(name) else filter(None, JOINT.split(name)))
    ]
