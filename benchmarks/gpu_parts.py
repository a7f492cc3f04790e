"""The parts of `gpu.py`, each a function of (note, device, tiny).

What one measurement raises is noted with its name, and the next one runs; the part has failed then.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median

import torch

from benchmarks.harness import MIB, CheckFailed, Clock, clock_of
from benchmarks.op_calls import FLOOR, failures
from benchmarks.ops import LARGE, cases, measure
from vlmr1.errors import UserError
from vlmr1_kernels import linear_grpo_loss, registry

ROOT = Path(__file__).parents[1]
PACKAGES = "torch triton transformers accelerate numpy pillow torchao bitsandbytes liger-kernel trl flash-attn peft"
MODULES = ("vlmr1_kernels", "vlmr1.grpo.trainer", "vlmr1.rollout", "benchmarks.ops", "benchmarks.trainer_arm")


class Note:
    """Writer of a part's results; `attempt` notes what fails within it."""

    def __init__(self, write: Callable[[str, object], object]):
        self.write = write
        self.failed: list[str] = []

    def __call__(self, name: str, value: object) -> None:
        self.write(name, value)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        try:
            yield
        except (*failures(), CheckFailed, UserError) as error:
            self.failed.append(name)
            self(f"{name} FAILED", f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def imports(note: Note, device: str, tiny: bool) -> None:
    installed = {each.name.lower(): each.version for each in metadata.distributions() if each.name}
    versions = {name: installed[name] for name in PACKAGES.split() if name in installed}
    note("versions", {"python": platform.python_version(), **versions})
    if device == "cuda":
        note("device", (torch.cuda.get_device_name(), torch.cuda.get_device_capability(), torch.cuda.mem_get_info()))
    for module in MODULES:
        with note.attempt(f"import {module}"):
            import_module(module)
    for dtype in (torch.bfloat16, torch.float32):
        note(f"auto {dtype}", {each.op: each.chosen for each in registry.explain_all(device, dtype)})


def ops(note: Note, device: str, tiny: bool) -> None:
    """The linear ops beside their GEMMs, by rows of a chunk too."""
    clock, side = clock_of(device), 64 if tiny else 8192
    square = torch.randn(side, side, device=device).bfloat16()
    times = [clock(lambda: square @ square) for _ in range(3 if tiny else 200)]
    rates = [2 * side**3 / median(times[i : i + 20]) / 1e12 for i in range(0, len(times), 20)]
    note("sustained TFLOP/s, by 20 products", [float(f"{rate:.3g}") for rate in rates])
    attention(note, device, tiny, linear=True)
    shapes, chunks = (((128, 64, 512),), (64, 128)) if tiny else (LARGE, (1024, 2048, 4096))
    for shape, chunk in product(shapes, chunks):
        with note.attempt(f"linear_grpo_loss {shape} {chunk}"):
            note(f"linear_grpo_loss {shape}, chunks of {chunk}, ms", by_chunk(*shape, chunk, device, clock))


def by_chunk(rows: int, dim: int, vocab: int, chunk: int, device: str, clock: Clock) -> float:
    """Milliseconds of `linear_grpo_loss`, forward and backward with a trained head, at this many rows a chunk."""
    from benchmarks.op_head import Head
    from benchmarks.peers.losses import SETTINGS

    head = Head(rows, dim, vocab, torch.bfloat16, device, "trainable")
    given = {"old_logp": head.old, "ref_logp": head.ref, "settings": SETTINGS, "chunk_mib": 4 * chunk * vocab / MIB}

    def call() -> None:
        loss, _ = linear_grpo_loss(head.hidden, head.weight, head.targets, head.seq_ids, head.advantages, **given)
        head.differentiate(loss)

    call()
    return round(1e3 * median(clock(call) for _ in range(8)), 3)


def attention(note: Note, device: str, tiny: bool, *, linear: bool = False) -> None:
    """The other ops. Of each case its arms: milliseconds, times its floor, rates, peak memory."""
    for case in cases("tiny" if tiny else "cuda"):
        if case.op.startswith("linear") != linear:
            continue
        names = (FLOOR, *registry.implementations(case.op), "eager") if tiny else None  # peers take long to import
        with note.attempt(str(case)):
            name, result = str(case), measure(case, device, names=names, rounds=3 if tiny else 9)
            for arm, row in result["arms"].items():
                shown = {key: value for key, value in row.items() if key not in ("note", "errors")}
                note(f"{name} {arm}", {"ms": 1e3 * median(row["seconds"]), **shown})
            note(f"{name} left out", result["skipped"])


def tests(note: Note, device: str, tiny: bool) -> None:
    """The tests that need a device; on a CPU those of the registry."""
    if find_spec("pytest") is None:
        note("left out", "pytest is not installed")
        return
    chosen = ["-m", "gpu", "tests/kernels", "tests/vlmr1"] if device == "cuda" else ["tests/kernels/test_registry.py"]
    words = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *chosen]
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-20_000:], done.stderr[-5_000:], flush=True)
    lines = done.stdout.strip().splitlines()
    bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    note(f"pytest {' '.join(chosen)}", {"summary": lines[-1] if lines else done.stderr[-500:], "bad": bad[:50]})
    if done.returncode:
        note.failed.append(f"pytest ended with {done.returncode}")
