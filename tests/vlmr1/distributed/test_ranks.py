"""Processes that wait for each other: one that fails, or is gone, ends the other with its message. And the bandwidth
between them."""

import os
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch

from tests.helpers.forked_ranks import finish_ranks, start_ranks
from vlmr1.distributed import allreduce
from vlmr1.distributed.ranks import local_device, process_group
from vlmr1.errors import SettingError, UserError


def meet(mode: str) -> int:
    """Two barriers, between which rank 1 does not what rank 0 waits for."""
    rank = int(os.environ["RANK"])
    try:
        with process_group(300) as ranks:
            ranks.barrier()
            if rank == 1 and mode == "fails":
                raise UserError("no disk left")
            if rank == 1 and mode == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            while (rank, mode) in ((0, "fails"), (1, "is slow")):
                ranks.raise_failure()  # as between two batches
                time.sleep(0.05)
            timeout = 1 if mode == "is slow" else 300
            replace(ranks, timeout=timedelta(seconds=timeout)).barrier()
            print("together", ranks.world_size, flush=True)
    except UserError as error:
        print(error, flush=True)
        os._exit(2)
    return 0


MODES = {
    "works": ("together 2", 0),
    "fails": ("rank 1: no disk left", 2),
    "is killed": ("another process has ended or timed out: ", 2),
    "is slow": ("another process has ended or timed out: ", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_the_second_process(mode, tmp_path):
    message, status = MODES[mode]
    ranks = start_ranks(meet, mode, logs=tmp_path / "rank")
    found = finish_ranks(ranks)[0]
    output = ranks[0].output
    assert found == status, output
    assert any(line.startswith(message) for line in output.splitlines()), output


def test_alone():
    with process_group(1.0) as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
        ranks.barrier()
        ranks.raise_failure()


def test_without_the_others_address(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingError, match="WORLD_SIZE is 2, but the processes cannot connect"), process_group(1.0):
        pass


def test_the_gpu_of_a_process_is_its_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert local_device(use_cpu=False) == torch.device("cuda", 2) and chosen == [torch.device("cuda", 2)]
    assert local_device(use_cpu=True) == torch.device("cpu") and len(chosen) == 1


# The bandwidth check


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
