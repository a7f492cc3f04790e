"""The bandwidth check, over two processes."""

import sys

import pytest

from tests.helpers.forked_ranks import finish_ranks, start_ranks
from vlmr1.distributed import allreduce


def test_bus_bandwidth():
    assert allreduce.bus_bandwidth(10**9, 0.5, 2) == pytest.approx(2.0)  # half of the bytes each way
    assert allreduce.bus_bandwidth(10**9, 0.5, 4) == pytest.approx(3.0)


def measure() -> int:
    sys.argv = ["allreduce", "--mib", "1", "2", "--rounds", "2"]
    allreduce.main()
    return 0


@pytest.mark.slow
def test_two_ranks_print_a_line_a_size(tmp_path):
    runs = start_ranks(measure, logs=tmp_path / "rank", variables={"CUDA_VISIBLE_DEVICES": ""})
    assert finish_ranks(runs) == [0, 0], [run.output for run in runs]
    lines = [[line.split() for line in run.output.splitlines() if " MiB " in line] for run in runs]
    assert [line[0] for line in lines[0]] == ["1", "2"] and lines[1] == []
    assert all(float(line[2]) > 0 and float(line[5]) > 0 for line in lines[0])
