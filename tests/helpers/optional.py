"""Packages without which tests are skipped, as on a machine with a GPU that has little installed."""

import os
from importlib.util import find_spec

OPTIONAL = ("bitsandbytes", "datasets", "deepspeed", "hypothesis", "matplotlib", "nbclient", "nbformat", "peft")
OPTIONAL += ("pycocotools", "scipy", "trl")
REQUIRED = "TEST_PACKAGES_REQUIRED"  # set by `make test`: its environment has them all, or its installation is at fault


def missing(error: BaseException | None) -> str | None:
    """The optional package that an import error is about. One that is installed, and lacks a module, is not missing."""
    if REQUIRED in os.environ:
        return None
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return package if package in OPTIONAL and find_spec(package) is None else None
