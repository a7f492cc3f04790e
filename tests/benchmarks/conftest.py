"""The tiny model and its groups, as in the tests of the trainer."""

from tests.vlmr1.conftest import image_files, make, model, processor  # noqa: F401 - fixtures
