"""Measures the all-reduce bandwidth between machines: `torchrun ... -m vlmr1.distributed.allreduce`.

Bus bandwidth is 2 (n - 1) / n * bytes / seconds with n ranks, as in nccl-tests; it is independent of n if the links are
the bottleneck."""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist

MIB = 2**20


def bus_bandwidth(size: int, seconds: float, ranks: int) -> float:
    """Return 2 (n - 1) / n * bytes / seconds in GB/s."""
    return 2 * (ranks - 1) / ranks * size / seconds / 1e9


def measure(size: int, rounds: int, device: torch.device) -> float:
    """Return the median seconds of an all-reduce of `size` bytes of float32. RuntimeError if its sum is wrong."""
    values = torch.full((size // 4,), float(dist.get_rank() + 1), device=device)
    dist.all_reduce(values)
    ranks = dist.get_world_size()
    if not bool((values == ranks * (ranks + 1) / 2).all()):
        raise RuntimeError(f"an all-reduce of {size} bytes returned a wrong sum")
    seconds = []
    for _ in range(rounds):
        values.fill_(1.0)
        dist.barrier()
        start = perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    return median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="All-reduce bandwidth over the ranks of torchrun.", allow_abbrev=False)
    parser.add_argument("--mib", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=60, help="seconds after which a waiting rank gives up")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=options.timeout))
    for mib in options.mib:
        seconds = measure(mib * MIB, options.rounds, device)
        if dist.get_rank() == 0:
            bandwidth = bus_bandwidth(mib * MIB, seconds, dist.get_world_size())
            print(f"{mib:6} MiB  {seconds * 1e3:9.2f} ms  bus {bandwidth:8.2f} GB/s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
