"""The parts of `gpu.py`, each a function of (note, device, tiny).

What one measurement raises is noted with its name, and the next one runs; the part has failed then.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from benchmarks import model as bench_model
from benchmarks.harness import MIB, CheckFailed, Clock, clock_of
from benchmarks.model import SHAPES, Shape
from benchmarks.op_calls import FLOOR, failures
from benchmarks.ops import LARGE, cases, measure
from benchmarks.planned import planned_phases, step_settings
from vlmr1.errors import UserError
from vlmr1_kernels import linear_grpo_loss, registry

ROOT = Path(__file__).parents[1]
PACKAGES = "torch triton transformers accelerate numpy pillow torchao bitsandbytes liger-kernel trl flash-attn peft"
MODULES = ("vlmr1_kernels", "vlmr1.grpo.trainer", "vlmr1.rollout", "benchmarks.ops", "benchmarks.trainer_arm")
CAP_GIB = 79.6  # an H100 of 80 GB reports 79.65 GiB
UPDATES = 3
LOGGED = ("seconds/", "memory/", "rollout/", "gpu/", "update/", "tokens_per_second", "grad_norm", "loss", "kl")


class Note:
    """Where a part's results go; `attempt` notes what fails within it."""

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
        note(f"auto {dtype}", {each.op: each.chosen for each in registry.doctor(device, dtype)})


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


def step3b(note: Note, device: str, tiny: bool) -> None:
    """Decoding by batch size, and updates, at 3B with float32 masters: the precision of the recipes."""
    shape, settings = SHAPES["tiny" if tiny else "3b"], {"bf16": True, "beta": 0.04, "optim": "adamw_torch_fused"}
    if not tiny:
        settings |= {"prompts_per_device": 5, "max_completion_length": 256}
    with TemporaryDirectory() as name:
        model, processor = _built(note, Path(name), shape, device)
        for groups, graphs in ((1, False),) if device == "cpu" else ((2, True), (8, True), (2, False)):
            with note.attempt(f"decode {groups} groups"):
                found = decode(model, processor, Path(name), shape, groups, graphs, tokens=6 if tiny else 96)
                note(f"decode {groups} groups x {shape.num_generations}, graphs {graphs}", found)
        with note.attempt("updates"):
            updates(note, model, processor, Path(name), shape, settings, device)


def _built(note: Note, folder: Path, shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    start = perf_counter()
    built = bench_model.build(folder, shape, device=device, dtype=dtype)
    note("model built, s", round(perf_counter() - start, 1))
    return built


def decode(
    model: Any, processor: Any, folder: Path, shape: Shape, groups: int, graphs: bool, *, tokens: int
) -> dict[str, float]:
    """Figures of the second of two generations by the native engine."""
    from vlmr1.models import family_of
    from vlmr1.rollout import NativeEngine, SamplingSettings

    prompts = bench_model.prompts_of(folder, model, processor, replace(shape, prompts=groups))
    options = {"dtype": torch.bfloat16, "cuda_graphs": graphs}
    engine = NativeEngine(model, family_of(model), processor.tokenizer, **options)
    for step in range(2):
        engine.generate(prompts, shape.num_generations, SamplingSettings(tokens), step=step)
    stats = asdict(engine.stats)
    return {"ms a decode step": 1e3 * stats["decode_seconds"] / (tokens - 1), **stats}


def updates(
    note: Note, model: Any, processor: Any, folder: Path, shape: Shape, settings: Mapping[str, Any], device: str
) -> None:
    """`UPDATES` steps of `GRPOTrainer.train`: logs of each, and the planned memory beside the measured."""
    from transformers import PrinterCallback

    from vlmr1.config import GRPOConfig
    from vlmr1.grpo.trainer import GRPOTrainer

    given: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "write_report": False, "reward_workers": 0}
    given |= {"max_steps": UPDATES, "logging_steps": 1, "disable_tqdm": True, "memory_by_phase": True}
    given |= {"use_cpu": device == "cpu", **step_settings(shape), **settings}
    config = GRPOConfig(output_dir=str(folder / "output"), **given)
    samples = [bench_model.sample_of(folder, shape, index) for index in range(2 * given["prompts_per_device"])]
    rewards = bench_model.rewards(shape.num_generations)
    trainer: Any = GRPOTrainer(model, config, samples, processor, reward_funcs=[rewards])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    for log in (log for log in trainer.state.log_history if "loss" in log):
        kept = {k: float(f"{v:.4g}") for k, v in log.items() if k.startswith(LOGGED) and isinstance(v, float)}
        note(f"update {log.get('step')}", kept)
    if device == "cuda":
        note("most reserved, GiB", round(torch.cuda.max_memory_reserved() / 2**30, 2))
    tokens = len(trainer.train_dataset[0].input_ids)
    planned = planned_phases(settings, shape, tokens, "cuda" if device == "cuda" else "cpu")
    note("planned MiB by phase", {phase: round(sum(causes.values()) / MIB) for phase, causes in planned.items()})


def cap7b(note: Note, device: str, tiny: bool) -> None:
    """Updates of the whole 7B with a KL in the memory of an H100 of 80 GB; the reference model is in host memory."""
    shape = SHAPES["tiny" if tiny else "7b"]
    settings: dict[str, Any] = {"bf16": True, "beta": 0.04, "reference": "offload"}
    if find_spec("torchao") is not None and device == "cuda":
        settings |= {"model_dtype": "bfloat16", "optim": "adamw_torch_8bit", "stochastic_rounding": True}
    else:
        settings |= {"optim": "sgd"}
        note("precision", "float32 weights and sgd: torchao is not installed, or there is no GPU")
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GIB * 2**30 / total))
    with TemporaryDirectory() as name, note.attempt("updates"):
        dtype = getattr(torch, settings.get("model_dtype", "float32"))
        model, processor = _built(note, Path(name), shape, device, dtype)
        updates(note, model, processor, Path(name), shape, settings, device)


def tests(note: Note, device: str, tiny: bool) -> None:
    """The tests that need a device; on a CPU those of the registry."""
    if find_spec("pytest") is None:
        note("left out", "pytest is not installed")
        return
    # The tests of test_triton.py run on the device where there is one, and have no mark.
    on_gpu = (["tests/kernels/test_triton.py"], ["-m", "gpu", "tests/kernels", "tests/vlmr1"])
    for chosen in on_gpu if device == "cuda" else (["tests/kernels/test_registry.py"],):
        words = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", *chosen]
        command = [sys.executable, "-m", "pytest", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(done.stdout[-20_000:], done.stderr[-5_000:], flush=True)
        lines = done.stdout.strip().splitlines()
        bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        note(f"pytest {' '.join(chosen)}", {"summary": lines[-1] if lines else done.stderr[-500:], "bad": bad[:50]})
        if done.returncode:
            note.failed.append(f"pytest ended with {done.returncode}")


Part = Callable[[Note, str, bool], None]
PARTS: Mapping[str, Part] = {each.__name__: each for each in (imports, ops, step3b, attention, tests, cap7b)}
