"""The Triton kernels compiled for GPUs that need not be there: registers, memory, vector widths, variants."""

import json
from typing import Any

import pytest

from tests.helpers.python import environment, python

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# Bytes a program may have: A100, RTX 30 and 40, H100, B200, RTX 50.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
COMPILED = [capability for capability in SHARED_MEMORY if capability != 89]  # its code is that of 86
VOCABULARY_KERNELS = ("statistics_kernel", "gradient_kernel", "loss_kernel")
DECODE_KERNELS = ("partials_kernel", "merge_kernel")
SAMPLING_KERNELS = ("block_statistics_kernel", "threshold_kernel", "choice_kernel")
OTHERS = ("merge_rows_kernel", "rope_kernel", "objective_kernel", "sequences_kernel", "advantages_kernel")
KERNELS = {*VOCABULARY_KERNELS, *DECODE_KERNELS, *SAMPLING_KERNELS, *OTHERS}
Kernel = dict[str, Any]


def resources(what: str) -> Any:
    """What `tests.helpers.resources` prints in another interpreter: in this one Triton may be interpreted."""
    variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    done = python("-W", "ignore", "-m", "tests.helpers.resources", what, env=variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=COMPILED, ids=lambda capability: f"sm_{capability}")
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    found = resources(str(request.param))
    assert {kernel["name"] for kernel in found} == KERNELS
    return found


def test_nothing_spills_and_shared_memory_suffices(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert (kernel["stack"], kernel["local"]) == (0, 0), kernel
        assert kernel["shared"] <= SHARED_MEMORY[kernel["capability"]], kernel


def test_vocabulary_passes(kernels: list[Kernel]) -> None:
    for kernel in (each for each in kernels if each["name"] in VOCABULARY_KERNELS):
        assert 2 * 32 * kernel["warps"] * kernel["registers"] <= 65_536, f"one program fills an SM: {kernel}"
        # Only if the lane that reads an element writes it can a float32 gradient take the place of its logits.
        assert kernel["conversions"] == 0, kernel
        loads, stores = kernel["loads"], kernel["stores"]
        scalars = sum(count for bits, count in loads.items() if bits in ("32", "64"))
        assert loads["128"] >= 4 and scalars <= 8, kernel  # the numbers of a row
        if kernel["name"] != "statistics_kernel":
            assert stores["128"] >= 2, kernel
        assert stores.get("32", 0) <= 3 and set(stores) <= {"128", "32"}, kernel
        # Only the last block of a bias, whose length nothing is known of, is read by elements.
        assert loads.get("16", 0) == 0 or kernel["case"] == "everything", kernel


def test_decode(kernels: list[Kernel]) -> None:
    for kernel in (each for each in kernels if each["name"] in DECODE_KERNELS):
        half, wide = "float32" not in kernel["case"], "wide" in kernel["case"]
        # Two programs share an SM, but for wide heads and in 99 KiB.
        limit = SHARED_MEMORY[kernel["capability"]]
        assert kernel["shared"] <= limit // (1 if wide or limit == 99 * 1024 else 2), kernel
        if kernel["name"] == "partials_kernel":
            # Keys and values arrive behind the work, 16 bytes at once; so do the entries of blocks.
            assert set(kernel["copies"]) == {16, 4}, kernel
            # Two products for the prefix, two for suffixes.
            assert kernel["half_products"] == kernel["products"], kernel
            assert kernel["products"] >= 4 if half else kernel["products"] == 0, kernel


def test_sampling(kernels: list[Kernel]) -> None:
    for kernel in (each for each in kernels if each["name"] in SAMPLING_KERNELS):
        if kernel["case"] != "sampling, everything":  # where rows are not aligned
            assert kernel["loads"]["128"] >= 1, kernel


def test_merge(kernels: list[Kernel]) -> None:
    for kernel in (each for each in kernels if each["name"] == "merge_rows_kernel"):
        assert kernel["loads"]["128"] >= 2 and kernel["stores"]["128"] >= 1, kernel
        assert set(kernel["loads"]) | set(kernel["stores"]) <= {"128", "32"}, f"32: log-sum-exps; {kernel}"
        assert kernel["barriers"] >= 1, f"before the log-sum-exps that it read are overwritten: {kernel}"
        assert kernel["registers"] <= 128, kernel


def test_compiles_for_rocm() -> None:
    assert set(resources("gfx942")) == KERNELS


def test_no_size_compiles_anew_waits_for_the_device_or_outgrows_the_grid() -> None:
    found = resources("variants")
    # Two where the calls differ: in the normalizer, the level, the gradient of an entropy, or the alignment of rows.
    two = {"sequences_kernel", "gradient_kernel", "objective_kernel", *SAMPLING_KERNELS}
    assert found["compiled"] == {name: 2 if name in two else 1 for name in KERNELS}
    # Default settings take two launches, min_p another one; nothing else computes.
    assert found["launched"] == {
        "sampling": [SAMPLING_KERNELS[0], SAMPLING_KERNELS[2]],
        "sampling, everything": [*SAMPLING_KERNELS],
    }
    assert found["dimensions"] == 1  # the first dimension of a grid holds 2^31 - 1 programs, the others 65,535
