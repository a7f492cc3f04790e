"""The bandwidth check, over two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlmr1.distributed.allreduce import bus_bandwidth

ROOT = Path(__file__).parents[3]


def test_bus_bandwidth():
    assert bus_bandwidth(10**9, 0.5, 2) == pytest.approx(2.0)  # half of the bytes each way
    assert bus_bandwidth(10**9, 0.5, 4) == pytest.approx(3.0)


def test_two_ranks_print_a_line_a_size():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "vlmr1.distributed.allreduce", "--mib", "1", "2", "--rounds", "2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert all(float(line.split()[2]) > 0 and float(line.split()[5]) > 0 for line in lines)
