"""Updates of supervised fine-tuning by the answers to a prompt: everything shared, nothing shared, TRL's SFTTrainer.

    python -m benchmarks sft --answers 1 4 --out benchmarks/results/sft-cpu.json

Arms must agree on loss and gradient norm of the same rows before they are timed. A sample is an update from the rows:
images and texts from their files, forward, backward, optimizer. TRL takes each answer with prompt and image as a row.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback, ProgressCallback

from benchmarks import model as bench_model
from benchmarks.arms import REFERENCES
from benchmarks.console import Progress, stop_on_signals
from benchmarks.harness import PeakMemory, alternate, clock_of, default_device, require_equal, table, write_result
from benchmarks.model import SHAPES, Shape
from benchmarks.report import number
from benchmarks.step_session import LOSS_FLOOR, TOLERANCE
from benchmarks.trainer_arm import LEARNING_RATE
from vlmr1.config import SFTConfig
from vlmr1.sft.trainer import SFTTrainer
from vlmr1.types import Sample

ROUNDS = 7
NAIVE = {"share_vision": False, "share_prompt": False, "pack": False}
NAIVE |= {"kernels": ",".join(f"{op}={name}" for op, name in REFERENCES.items())}
LABELS = {"naive": "vlmr1, nothing shared", "trl": "TRL", "all": "vlmr1"}


@dataclass
class Bed:
    """Model, rows and settings that all arms start from."""

    folder: Path
    shape: Shape
    device: str
    dtype: str
    model: Any
    processor: Any
    prepared: Any = None  # the model as an accelerator wraps it

    def common(self) -> dict[str, Any]:
        """Settings of both libraries."""
        known = {"output_dir": str(self.folder / "output"), "use_cpu": self.device == "cpu", "report_to": "none"}
        return known | {"bf16": self.dtype == "bfloat16", "gradient_checkpointing": self.shape.checkpointing}


class Arm:
    """Updates of a trainer on all of its rows."""

    model: Any
    prepared: Any
    trainer: Any

    def batch(self) -> Any:
        """The rows from their files."""
        raise NotImplementedError

    def start(self) -> None:
        """Make the optimizer's moments: gradients of 0 move nothing."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.step_optimizer()

    def step_optimizer(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        self.trainer.training_step(self.prepared, self.batch())
        self.step_optimizer()

    def figures(self) -> dict[str, float]:
        """Loss and gradient norm of the rows."""
        loss = float(self.trainer.training_step(self.prepared, self.batch()))
        norm = bench_model.gradient_norm(self.model)
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss, "grad_norm": norm}


class Ours(Arm):
    """`vlmr1 sft` with these settings, on the shared model."""

    def __init__(self, bed: Bed, samples: Sequence[Sample], settings: Mapping[str, Any]):
        config = SFTConfig(prompts_per_device=len(samples), disable_tqdm=True, **bed.common(), **settings)
        self.model = bed.model
        self.trainer = SFTTrainer(bed.model, config, samples, bed.processor)
        for callback in (PrinterCallback, ProgressCallback):
            self.trainer.remove_callback(callback)
        bed.prepared = bed.prepared or self.trainer.accelerator.prepare(bed.model)
        self.prepared = bed.prepared
        self.start()

    def batch(self) -> list[Any]:
        return [self.trainer.train_dataset[place] for place in range(len(self.trainer.train_dataset))]

    def step(self) -> None:
        super().step()
        self.trainer.end_update()
        self.trainer.pending.take()


class TRL(Arm):
    """TRL's SFTTrainer, on a copy of the model: it changes its forward."""

    def __init__(self, bed: Bed, samples: Sequence[Sample]):
        import datasets
        from PIL import Image
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer

        rows = []
        for sample in samples:
            image = Image.open(str(sample.images[0])).convert("RGB")
            for answer in (sample.solution, *sample.other_solutions):
                prompt, said = (
                    [{"role": r, "content": t}] for r, t in (("user", bench_model.QUESTION), ("assistant", answer))
                )
                rows.append({"prompt": prompt, "completion": said, "image": image})
        config = SFTConfig(per_device_train_batch_size=len(rows), max_length=None, **bed.common())
        self.model = copy.deepcopy(bed.model)
        data = datasets.Dataset.from_list(rows)
        self.trainer = SFTTrainer(self.model, config, train_dataset=data, processing_class=bed.processor)
        self.trainer.current_gradient_accumulation_steps = 1  # the training loop sets it
        self.prepared = self.trainer.accelerator.prepare(self.model)
        self.start()

    def batch(self) -> Any:
        return self.trainer.data_collator([dict(row) for row in self.trainer.train_dataset])


def samples_of(folder: Path, shape: Shape, answers: int) -> list[Sample]:
    """Rows with an image each and so many answers of digits."""
    random = np.random.default_rng(3)
    texts = [" ".join(map(str, random.integers(0, 10, shape.completion_length // 2))) for _ in range(8 * answers)]
    made = []
    for place in range(shape.prompts):
        first, *others = texts[place * answers : (place + 1) * answers]
        made.append(replace(bench_model.sample_of(folder, shape, place), solution=first, other_solutions=tuple(others)))
    return made


def measure(bed: Bed, answers: int, rounds: int, progress: Progress) -> dict[str, Any]:
    """Arms by name with samples and peak memory, and the tokens of an update. CheckFailed where arms disagree."""
    samples, clock = samples_of(bed.folder, bed.shape, answers), clock_of(bed.device)
    arms: dict[str, Arm] = {"naive": Ours(bed, samples, NAIVE), "all": Ours(bed, samples, {}), "trl": TRL(bed, samples)}
    progress.say(f"checking {', '.join(arms)} with {answers} answers a prompt")
    checks = {name: arm.figures() for name, arm in arms.items()}
    require_equal(checks, TOLERANCE[bed.dtype], loss=LOSS_FLOOR[bed.dtype])
    rows: dict[str, Any] = {name: {"check": checks[name]} for name in arms}
    for name, arm in arms.items():
        arm.step()  # what a first update allocates once
        peak = PeakMemory()
        arm.step()
        rows[name]["peak_mib"] = peak.mib()

    def seconds(arm: Arm) -> float:
        gc.collect()
        return clock(arm.step)

    progress.say(f"{rounds} rounds")
    taken = alternate({name: lambda arm=arm: seconds(arm) for name, arm in arms.items()}, rounds=rounds)
    groups = arms["all"].batch()
    tokens = {"prompt_tokens": len(groups[0].prompt.input_ids)}
    tokens["answer_tokens"] = sum(len(each.token_ids) for group in groups for each in group.completions)
    return tokens | {"arms": {name: row | {"seconds": taken[name]} for name, row in rows.items()}}


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark, write its result and print its table."""
    parser = argparse.ArgumentParser(prog="vlmr1 bench sft", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the tiny shape")
    parser.add_argument("--answers", type=int, nargs="+", default=[1, 4], help="answers to a prompt")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples an arm")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results/sft.json"), help="result file")
    options = parser.parse_args(words)
    if min(options.answers) < 1:
        parser.error("--answers: every number must be at least 1")
    stop_on_signals()
    device = default_device()
    if device == "cpu":
        torch.set_num_threads(options.threads)
    name = "tiny" if options.quick else "3b" if device == "cuda" else "bench"
    shape, dtype, progress = SHAPES[name], "bfloat16" if device == "cuda" else "float32", Progress()
    figures: dict[str, Any] = {"shape": name, "device": device, "dtype": dtype, "prompts": shape.prompts, "answers": {}}
    with TemporaryDirectory() as folder:
        for answers in options.answers:
            model, processor = bench_model.build(Path(folder), shape, device=device)
            bed = Bed(Path(folder), shape, device, dtype, model, processor)
            figures["answers"][str(answers)] = measure(bed, answers, options.rounds, progress)
    print(f"\n{quoted(figures)}\n\nwritten: {write_result(options.out, 'sft', figures)}")
    return 0


def quoted(result: Mapping[str, Any]) -> str:
    """Return the table: time and memory of each arm, by the answers to a prompt; below it where a file's are from."""
    rows = []
    for answers, found in result["answers"].items():
        ours = found["arms"]["all"]
        for name, label in LABELS.items():
            arm = found["arms"][name]
            time, peak, least = median(arm["seconds"]), arm["peak_mib"], ours["peak_mib"]
            ratio = f"{time / median(ours['seconds']):.1f}x"
            memory = ["", ""] if not peak or not least else [f"{peak:,.0f} MiB", f"{peak / least:.1f}x"]
            rows.append([f"{answers} a prompt: {label}", f"{number(time)} s", ratio, *memory])
    made = table(["one update, answers", "time", "of vlmr1", "peak memory", "of vlmr1"], rows)
    if "commit" not in result:
        return made
    first = next(iter(result["answers"].values()))
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("torch", "transformers", "trl"))
    rounds = len(first["arms"]["all"]["seconds"])
    source = (
        f"{result['prompts']} prompts of {first['prompt_tokens']} tokens an update, {result['dtype']}; "
        f"{result['machine']}; medians of {rounds}; {versions}; commit {result['commit']}: `{result['command']}`. "
        "Memory is above what the process holds between updates."
    )
    return f"{made}\n\n{source}"
