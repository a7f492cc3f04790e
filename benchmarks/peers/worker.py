"""A peer trainer in a process of its own: reads requests, a line each, and answers each with a line of JSON.

    figures    {"loss", "grad_norm"} of one update from the fixed groups
    seconds    seconds of one step
    peak_mib   peak memory during one step, above what was held before it

Weights, prompts and groups are those of `benchmarks.model`, made from the same seeds.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks import model as bench_model
from benchmarks.harness import PeakMemory, clock_of, default_device
from benchmarks.model import SHAPES
from benchmarks.peers.client import PEERS

REQUESTS = ("figures", "seconds", "peak_mib")


class Server:
    """One peer and its answers. A peer's class has `update(groups)`, which accumulates the gradient of fixed groups and
    returns the loss, and `step()`."""

    def __init__(self, name: str, folder: Path, shape_name: str, dtype: str):
        device, self.shape = default_device(), SHAPES[shape_name]
        self.model, processor = bench_model.build(folder, self.shape, device=device)
        self.clock = clock_of(device)
        prompts = bench_model.prompts_of(folder, self.model, processor, self.shape)
        self.groups = bench_model.groups_of(prompts, self.shape)
        trainer = getattr(import_module(f"benchmarks.peers.{name}"), name.upper())
        self.trainer: Any = trainer(self.model, processor, folder, self.shape, dtype)

    def figures(self) -> dict[str, float]:
        loss = self.trainer.update(self.groups)
        return {"loss": loss, "grad_norm": bench_model.gradient_norm(self.model)}

    def seconds(self) -> float:
        return self.clock(self.trainer.step)

    def peak_mib(self) -> float | None:
        peak = PeakMemory()
        self.trainer.step()
        return peak.mib()

    def answer(self, request: str) -> Any:
        """Answer one request; SystemExit for an unknown one."""
        if request not in REQUESTS:
            raise SystemExit(f"{request!r} is none of {', '.join(REQUESTS)}")
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        return getattr(self, request)()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.worker")
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for tokenizer and images")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the passes")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    answers = sys.stdout
    with redirect_stdout(sys.stderr):  # what libraries print is no answer
        server = Server(options.peer, options.folder, options.shape, options.dtype)
        for line in sys.stdin:
            print(json.dumps(server.answer(line.strip())), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
