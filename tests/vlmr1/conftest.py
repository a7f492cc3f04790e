"""A tiny model with the shipped weights, images of noise, and groups made by hand. A module with a fixture `checkpoint`
of its own has model and processor from there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.maker import Maker
from vlmr1.models import load_model, load_processor
from vlmr1.tiny import CHECKPOINT, digits

SIZES = {56: (56, 56), 84: (84, 84), 112: (112, 112), 140: (140, 140)}  # width, height
SIZES |= {"wide": (112, 56), "tall": (56, 140), "odd": (75, 133)}


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    return CHECKPOINT


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> Any:
    return load_processor(checkpoint)


@pytest.fixture
def model(checkpoint: Path) -> Any:
    return load_model(checkpoint)


@pytest.fixture(scope="session")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Path]:
    """One PNG of noise a size, a number of px or a name."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    files = {}
    for name, (width, height) in SIZES.items():
        files[name] = folder / f"{name}.png"
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(files[name])
    return files


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows of drawn digits, to be read only."""
    folder = tmp_path_factory.mktemp("data")
    digits.write(folder, "train", 8, seed=3)
    return folder


@pytest.fixture
def make(model: Any, processor: Any, image_files: dict[Any, Path]) -> Maker:
    return Maker(model, processor, image_files)
