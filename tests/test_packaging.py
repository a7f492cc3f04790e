"""What a built package holds, and what no file may name."""

import re
import runpy
import subprocess
import tomllib
from contextlib import chdir
from pathlib import Path
from unittest import mock

import pytest
from setuptools import Distribution

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT / "vlmr1", ROOT / "kernels" / "vlmr1_kernels")
# Written in two parts, so that this file passes its own test.
REGISTRIES = ("pypi" + ".org", "python" + "hosted.org", "download.py" + "torch.org", "npmjs" + ".org")
MACHINE = re.compile(r"(?<![\w.~})-])/(?:wo" + "rk|home|Users)/")


@pytest.fixture(scope="module")
def built() -> set[str]:
    """The sources of a build, relative to the root; nothing is built."""
    arguments = {}
    with chdir(ROOT), mock.patch("setuptools.setup", arguments.update):
        runpy.run_path("setup.py")
        command = Distribution({**arguments, "script_name": "setup.py"}).get_command_obj("build_py")
        command.ensure_finalized()
        return set(command.get_output_mapping().values())


def tracked() -> list[Path]:
    """Files that git tracks or would add; without git the test is skipped."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_source_file_is_built(built):
    on_disk = {str(path.relative_to(ROOT)) for root in SOURCES for path in root.rglob("*.py")}
    assert on_disk == {name for name in built if name.endswith(".py")}


def test_all_data_beside_the_sources_is_built(built):
    data = {path for path in tracked() if path.suffix != ".py" and any(path.is_relative_to(root) for root in SOURCES)}
    assert {str(path.relative_to(ROOT)) for path in data} - built == set()


def test_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"vlmr1": "vlmr1.cli:command"}
    assert project["requires-python"] == ">=3.11"
    assert {"torch>=2.11", "transformers>=5.18"} <= set(project["dependencies"])
    assert "triton>=3.6" in project["optional-dependencies"]["gpu"]


def test_no_file_names_a_registry_or_an_absolute_path_of_one_machine():
    found = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        found += [(str(path.relative_to(ROOT)), name) for name in REGISTRIES if name in text]
        found += [(str(path.relative_to(ROOT)), match[0]) for match in MACHINE.finditer(text)]
    assert found == []
