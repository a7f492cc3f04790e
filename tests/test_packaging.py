"""What a built package holds, and what no file may name."""

import os
import re
import runpy
import shutil
import subprocess
import sys
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
def mapping() -> dict[str, str]:
    """Each file of a build with its source, relative to the root; nothing is built."""
    arguments = {}
    with chdir(ROOT), mock.patch("setuptools.setup", arguments.update):
        runpy.run_path("setup.py")
        command = Distribution({**arguments, "script_name": "setup.py"}).get_command_obj("build_py")
        command.ensure_finalized()
        folder = Path(command.build_lib)
        files = command.get_output_mapping().items()
        return {str(Path(target).relative_to(folder)): source for target, source in files}


@pytest.fixture(scope="module")
def built(mapping) -> set[str]:
    """The sources of a build."""
    return set(mapping.values())


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


@pytest.mark.slow
def test_a_build_runs_apart_from_the_checkout(mapping, tmp_path):
    """It finds recipes, tiny model, digits, configurations and templates among its own files."""
    for target, source in mapping.items():
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, tmp_path / target)
    short = "--max_steps 1 --num_generations 2 --prompts_per_device 1 --max_completion_length 8 --use_cpu true"
    commands = ["doctor", "plan --model Qwen/Qwen2.5-VL-3B-Instruct --recipe rec-3b-lora"]
    commands += [f"train --recipe tiny-digits --output_dir run {short}"]
    code = f"import sys, vlmr1.cli as cli; sys.exit(max(cli.main(each.split()) for each in {commands}) or 0)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = f"{code} if cli.__file__.startswith({str(tmp_path)!r}) else sys.exit('another vlmr1')"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "run" / "training.html").exists() and (tmp_path / "run" / "model.safetensors").exists()


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
