"""Processes that wait for each other: one that fails, or is gone, ends the other with its message."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlmr1.errors import SettingError
from vlmr1.evaluation.ranks import device, joined

SCRIPT = """
import os, signal, sys, time
from vlmr1.errors import UserError
from vlmr1.evaluation.ranks import device, joined
mode, rank = sys.argv[1], int(os.environ["RANK"])
try:
    with joined(float(sys.argv[2])) as ranks:
        ranks.barrier()
        if rank == 1 and mode == "fails":
            raise UserError("no disk left")
        if rank == 1 and mode == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and mode == "is slow":
            time.sleep(60)
        if rank == 0 and mode == "fails":
            while True:
                ranks.look()  # as between two batches
                time.sleep(0.05)
        ranks.barrier()
        print("together", ranks.count, flush=True)
except UserError as error:
    print(error, flush=True)
    os._exit(2)
"""


def pair(mode: str, timeout: float) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[3]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    command = [sys.executable, "-c", SCRIPT, mode, str(timeout)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}, **options) for rank in (0, 1)]


MODES = {
    "works": (300, "together 2\n", 0),
    "fails": (300, "rank 1: no disk left\n", 2),
    "is killed": (300, "another process has ended, or did not reach the barrier: ", 2),
    "is slow": (3, "another process has ended, or did not reach the barrier: ", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_second_process(mode):
    timeout, message, status = MODES[mode]
    first, second = pair(mode, timeout)
    said, errors = first.communicate(timeout=300)
    if mode == "is slow":
        second.send_signal(signal.SIGKILL)
    second.communicate()
    assert said.startswith(message), errors[-2000:]
    assert first.returncode == status


def test_alone():
    with joined(1.0) as ranks:
        assert (ranks.rank, ranks.count, ranks.is_first) == (0, 1, True)
        ranks.barrier()
        ranks.look()


def test_without_the_others_address(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingError, match="WORLD_SIZE is 2, but the processes cannot meet"), joined(1.0):
        pass


def test_the_gpu_of_a_process_is_its_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert device(use_cpu=False) == torch.device("cuda", 2) and chosen == [torch.device("cuda", 2)]
    assert device(use_cpu=True) == torch.device("cpu") and len(chosen) == 1
