"""What each setting saves: peak memory of a whole GRPO update on the bench model, setting by setting and together.

    python -m benchmarks.memory --out benchmarks/results/memory-cpu.json

Each arm in a process of its own, measured as in `benchmarks.plan`: the highest resident set of each phase of the second
of two updates, above the resident set before the model was made.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness import table, write_result
from benchmarks.plan import ENVIRONMENT
from benchmarks.plan_step import Case, case, measured
from benchmarks.suite.quoted import MEMORY_HEAD, memory_rows

BASE = {"prompts_per_device": 4, "num_generations": 8, "max_completion_length": 64}
KEEP = {"beta": 0.0, "skip_zero_advantage": False}  # no reference; the same completions in the pass
NARROW = {"model_dtype": "bfloat16", "bf16": True, "optim": "adamw_torch_8bit", "stochastic_rounding": True}
LORA = {"use_peft": True, "lora_r": 16, "lora_alpha": 32}
CHECKPOINTED = {"gradient_checkpointing": True, "tokens_per_pack": 1024}
ARMS: dict[str, dict[str, Any]] = {
    "base: float32, AdamW, a reference model": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "tokens_per_pack=1024": {"tokens_per_pack": 1024},
    "freeze_vision": {"freeze_vision": True},
    "beta=0": KEEP,
    "optim=adamw_bnb_8bit": {"optim": "adamw_bnb_8bit"},
    "bfloat16 weights, stochastic_rounding": NARROW,
    "use_peft": LORA,
    "use_peft, load_in_4bit": LORA | {"load_in_4bit": True},
    "nothing shared (the naive step)": {"share_vision": False, "share_prompt": False, "pack": False},
    "all of a full update: checkpointing, small packs, no reference, 8 bits": CHECKPOINTED
    | KEEP
    | {"optim": "adamw_bnb_8bit"},
    "all with an adapter: checkpointing, small packs, 4 bits": CHECKPOINTED | LORA | {"load_in_4bit": True},
}


def case_of(name: str) -> Case:
    settings: dict[str, Any] = BASE | ARMS[name]
    return case(**settings)


def measure(name: str, threads: int) -> dict[str, float]:
    """MiB of each phase, in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.memory", "--one", name, "--threads", str(threads)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **ENVIRONMENT})
    found = json.loads(done.stdout.splitlines()[-1])
    found.pop("prompt_tokens")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), metavar="ARM", default=list(ARMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="result file, JSON")
    parser.add_argument("--one", choices=list(ARMS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.one:
        with TemporaryDirectory() as folder:
            print(json.dumps(measured(case_of(options.one), Path(folder), "cpu")))
        return 0
    found: dict[str, dict[str, float]] = {}
    for name in options.arms:
        found[name] = measure(name, options.threads)
        print(name, f"{max(found[name].values()):.0f} MiB", flush=True)
    if options.out is not None:
        settings = {name: BASE | ARMS[name] for name in found}
        write_result(options.out, {"threads": options.threads, "settings": settings, "peak_mib": found})
    print(table(MEMORY_HEAD, memory_rows(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
