"""The Triton kernels compiled for GPUs that need not be there: registers, memory, vector widths, variants."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have
VOCABULARY_KERNELS = ("statistics_kernel", "gradient_kernel", "loss_kernel")
KERNELS = {*VOCABULARY_KERNELS, "objective_kernel", "sequences_kernel", "advantages_kernel"}


def python(*args: str) -> Any:
    """What another interpreter prints, as JSON: in this one Triton may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *args], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=SHARED_MEMORY, ids=lambda capability: f"sm_{capability}")
def resources(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    found = python("-m", "tests.helpers.resources", "--capability", str(request.param))
    assert {kernel["name"] for kernel in found} == KERNELS
    return found


def test_nothing_spills_and_shared_memory_suffices(resources: list[dict[str, Any]]) -> None:
    for kernel in resources:
        assert (kernel["stack"], kernel["local"]) == (0, 0), kernel
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]], kernel


def test_two_programs_of_the_vocabulary_passes_share_an_sm(resources: list[dict[str, Any]]) -> None:
    for kernel in resources:
        if kernel["name"] in VOCABULARY_KERNELS:
            assert 2 * 32 * kernel["warps"] * kernel["registers"] <= 65_536, kernel


def test_logits_move_in_16_bytes(resources: list[dict[str, Any]]) -> None:
    for kernel in resources:
        if kernel["name"] not in VOCABULARY_KERNELS:
            continue
        loads, stores = kernel["loads"], kernel["stores"]
        scalars = sum(count for bits, count in loads.items() if bits in ("32", "64"))
        assert loads["128"] >= 4 and scalars <= 8, kernel  # the numbers of a row
        if kernel["name"] != "statistics_kernel":
            assert stores["128"] >= 2, kernel
        assert stores.get("32", 0) <= 3 and set(stores) <= {"128", "32"}, kernel
        # Only the last block of a bias, whose length nothing is known of, is read by elements.
        assert loads.get("16", 0) == 0 or kernel["case"] == "everything", kernel


def test_the_lane_that_reads_an_element_writes_it(resources: list[dict[str, Any]]) -> None:
    # What makes a float32 gradient in the place of its logits safe.
    for kernel in resources:
        if kernel["name"] in VOCABULARY_KERNELS:
            assert kernel["conversions"] == 0, kernel


VARIANTS = """
import json
from vlmr1_kernels.settings import GRPOSettings
from tests.helpers import resources

SHAPES = [(8192, 151_936, 64, 2048), (1, 1, 1, 8), (70_000, 8193, 16, 64), (4097, 151_937, 4096, 16), (1025, 16, 8, 1)]
with resources.compiling(90) as launches:
    for rows, vocabulary, sequences, dim in SHAPES:
        sizes = {"rows": rows, "vocabulary": vocabulary, "dim": dim}
        for loss_type in ("dapo", "gspo"):
            resources.loss_step(GRPOSettings(loss_type, beta=0.1), sequences=sequences, **sizes)
        resources.logprob_step(**sizes)
        resources.group_advantages.group_advantages(resources.meta(sequences * rows), rows, scale="group")
variants = {launch.name: set() for launch in launches}
for launch in launches:
    variants[launch.name].add(launch.compiled.hash)
print(json.dumps([
    {name: len(hashes) for name, hashes in variants.items()}, max(len(launch.grid) for launch in launches)
]))
"""


def test_no_shape_compiles_anew_waits_for_the_device_or_outgrows_the_grid() -> None:
    # On meta tensors: whatever would have to wait for a value raises.
    variants, dimensions = python("-c", VARIANTS)
    # Two where the calls differ: in the normalizer, the level, or the gradient of an entropy.
    two = {"sequences_kernel": 2, "gradient_kernel": 2, "objective_kernel": 2}
    assert variants == two | {"loss_kernel": 1, "statistics_kernel": 1, "advantages_kernel": 1}
    assert dimensions == 1  # the first dimension of a grid holds 2^31 - 1 programs, the others 65,535
