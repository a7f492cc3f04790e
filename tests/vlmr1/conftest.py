"""A tiny model with the shipped weights, images of three sizes, and groups made by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.maker import Maker
from vlmr1.models import load_model, load_processor
from vlmr1.tiny import CHECKPOINT, digits


@pytest.fixture(scope="session")
def processor() -> Any:
    return load_processor(CHECKPOINT)


@pytest.fixture
def model() -> Any:
    return load_model(CHECKPOINT)


@pytest.fixture(scope="session")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """One PNG a size in px, of noise."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    files = {}
    for size in (56, 84, 112, 140):
        files[size] = folder / f"{size}.png"
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(files[size])
    return files


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows of drawn digits, to be read only."""
    folder = tmp_path_factory.mktemp("data")
    digits.write(folder, "train", 8, seed=3)
    return folder


@pytest.fixture
def make(model: Any, processor: Any, image_files: dict[int, Path]) -> Maker:
    return Maker(model, processor, image_files)
