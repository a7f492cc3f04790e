"""Rollouts and whole steps of the bench model: the native engine, `generate` on repeated prompts, TRL's trainer.

    python -m benchmarks.rollout --out benchmarks/results/rollout.json

Rollouts: one group of 8 completions of 64 tokens, all drawn to their end (no stop token), float32; tokens a second of
the native engine and of `generate` on the prompt repeated 8 times, which is what TRL does. Steps: rollout, reward,
reference, policy, backward and optimizer of `GRPOTrainer` here, and of TRL's, in a process of its own that stays up;
the same weights, prompt and lengths. Arms in turn, medians; peak memory each in a process of its own, above model and
reference model.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import model as bench_model
from benchmarks.harness import PeakMemory, alternate, ratio, timed, write_result
from benchmarks.model import BENCH
from benchmarks.peers.trl import TRLStep
from benchmarks.step_arms import BETA, Worker
from vlmr1.config import GRPOConfig
from vlmr1.data.prompts import PromptBuilder
from vlmr1.models import adapter_of
from vlmr1.rollout import ENGINES, SamplingSettings
from vlmr1.trainer import GRPOTrainer

STEPS = ("vlmr1", "trl")


class RolloutArm:
    """One engine on one prompt."""

    def __init__(self, engine: str, folder: Path, prompts: int):
        self.model, processor = bench_model.read(folder)
        self.model.generation_config.eos_token_id = None
        adapter = adapter_of(self.model)
        self.engine = ENGINES[engine](self.model, adapter, processor.tokenizer)
        builder = PromptBuilder(self.model, adapter, processor)
        self.prompts = [bench_model.prompt_of(folder, builder, BENCH, index) for index in range(prompts)]
        self.settings = SamplingSettings(BENCH.completion_length)

    def run(self) -> None:
        groups = self.engine.generate(self.prompts, BENCH.num_generations, self.settings)
        lengths = {len(completion.token_ids) for group in groups for completion in group.completions}
        if lengths != {BENCH.completion_length}:
            raise RuntimeError(f"completions of {sorted(lengths)} tokens were drawn, not of {BENCH.completion_length}")


class StepArm:
    """Whole steps of this trainer, optimizer included."""

    def __init__(self, folder: Path, prompts: int):
        model, processor = bench_model.read(folder)
        model.generation_config.eos_token_id = None
        config = GRPOConfig(
            output_dir=str(folder / "output" / "vlmr1"),
            use_cpu=not torch.cuda.is_available(),
            num_generations=BENCH.num_generations,
            prompts_per_device=prompts,
            max_completion_length=BENCH.completion_length,
            beta=BETA,
            report_to="none",
            memory_by_phase=False,  # the peak of the whole step is what is measured
        )
        self.trainer = GRPOTrainer(model, config, [], processor, reward_funcs=[spread])
        self.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.optimizer = self.trainer.create_optimizer()
        builder = PromptBuilder(model, self.trainer.adapter, processor)
        self.prompts = [bench_model.prompt_of(folder, builder, BENCH, index) for index in range(prompts)]

    def run(self) -> None:
        self.trainer.training_step(self.model, self.prompts)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)


def spread(completions: list, **_: Any) -> list[float]:
    """Rewards that differ within a group, whatever is drawn."""
    return [float(index % 3) for index in range(len(completions))]


def make_step(name: str, folder: Path, prompts: int) -> Any:
    return StepArm(folder, prompts) if name == "vlmr1" else TRLStep(folder, prompts, BETA, spread)


def seconds(arm: Any) -> float:
    return timed(arm.run)()


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        folder = options.folder or bench_model.write(Path(stack.enter_context(TemporaryDirectory())))
        if options.memory:
            print(json.dumps({"peak_mib": memory(options, folder)}))
        elif options.serve:
            answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
            arm = make_step(options.arm, folder, options.prompts)
            for _ in sys.stdin:
                print(json.dumps(seconds(arm)), file=answers, flush=True)
        else:
            measure(options, folder)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=1, help="groups a step")
    parser.add_argument("--out", type=Path, help="result file, JSON")
    parser.add_argument("--arm", choices=STEPS, default="vlmr1", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Rollouts, steps, memory; print and write."""
    tokens = options.prompts * BENCH.num_generations * BENCH.completion_length
    arms = {name: RolloutArm(name, folder, options.prompts) for name in ("native", "transformers")}
    drawn = alternate({name: lambda arm=arm: seconds(arm) for name, arm in arms.items()}, rounds=options.rounds)
    arms.clear()
    here = make_step("vlmr1", folder, options.prompts)
    worker = Worker(command(options, folder, "trl", "--serve"))
    try:
        calls = {"vlmr1": lambda: seconds(here), "trl": lambda: worker.ask("step")}
        steps = alternate(calls, rounds=options.rounds)
    finally:
        worker.close()
    peak = {name: memory_of(options, folder, name) for name in STEPS}
    result: dict[str, Any] = {
        "prompts": options.prompts,
        "rollout_seconds": drawn,
        "tokens_per_second": {name: tokens / median(times) for name, times in drawn.items()},
        "rollout transformers/native": ratio(drawn, "transformers", "native"),
        "step_seconds": steps,
        "step trl/vlmr1": ratio(steps, "trl", "vlmr1"),
        "peak_mib": peak,
        "memory vlmr1/trl": peak["vlmr1"] / peak["trl"],
    }
    for name, value in result.items():
        if not name.endswith("seconds"):
            print(f"{name:30}{value}")
    if options.out is not None:
        print(f"written: {write_result(options.out, result)}")


def command(options: argparse.Namespace, folder: Path, name: str, mode: str) -> list[str]:
    words = ["--threads", str(options.threads), "--prompts", str(options.prompts), "--folder", str(folder)]
    return [sys.executable, "-m", "benchmarks.rollout", "--arm", name, mode, *words]


def memory(options: argparse.Namespace, folder: Path) -> float:
    """Peak of two steps, in MiB above model and reference model."""
    arm = make_step(options.arm, folder, options.prompts)
    peak = PeakMemory()
    arm.run()
    arm.run()
    return peak.mib()


def memory_of(options: argparse.Namespace, folder: Path, name: str) -> float:
    words = command(options, folder, name, "--memory")
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


if __name__ == "__main__":
    sys.exit(main())
