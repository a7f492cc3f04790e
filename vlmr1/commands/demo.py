"""`vlmr1 demo`: GRPO on the embedded model and data, with a table before and after, a curve and a report."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vlmr1.commands.arguments import parse_config
from vlmr1.commands.train import train
from vlmr1.config import GRPOConfig
from vlmr1.data.samples import load_samples
from vlmr1.evaluation.evaluate import Evaluation, evaluate
from vlmr1.lifecycle.checkpoint import last_complete
from vlmr1.lifecycle.disk import check_output_dir
from vlmr1.models import load_model, load_processor
from vlmr1.report.curves import reward_curve
from vlmr1.report.demo import Example, write_report
from vlmr1.report.progress import read_metrics
from vlmr1.rewards.answer import predicted_box, solution_box
from vlmr1.rewards.question import Question
from vlmr1.tiny import DIGITS, digits, model_path
from vlmr1.types import Sample

HELD_OUT_ROWS = 400
SHOWN = 12  # held-out images in the report
SETTINGS = ("learning_rate", "beta", "epsilon", "num_generations", "prompts_per_device", "max_steps")
SETTINGS += ("temperature", "loss_type", "seed")
Row = tuple[str, str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="default: output/demo-SEED")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    demo(options.seed, options.output_dir or Path("output") / f"demo-{options.seed}", rest)


def demo(seed: int, output_dir: Path, changes: Sequence[str] = ()) -> None:
    """Train as `vlmr1 train --recipe tiny-digits` does, between two greedy evaluations on held-out images.

    `changes` are further settings, as on the command line."""
    begin = time.monotonic()
    arguments = ["--output_dir", str(output_dir), "--seed", str(seed), "--data_file_paths", DIGITS]
    config = parse_config(arguments, recipe="tiny-digits", changes=changes)
    config.check_device()
    check_output_dir(output_dir)
    samples = held_out(config, output_dir)
    before = measure(config, model_path(str(config.model_name_or_path)), samples)
    print(f"before: held-out acc@0.5 {before.result.accuracy:.3f}, mean IoU {before.result.mean_iou:.3f}", flush=True)
    train(config)
    checkpoint = last_complete(output_dir)
    if checkpoint is None:
        raise RuntimeError(f"the run ended without a checkpoint in {output_dir}")
    after = measure(config, str(checkpoint), samples)
    history = read_metrics(output_dir)
    rows, gain = summary(before, after, history)
    curve = reward_curve(history, output_dir / "curve.png")
    report = write_report(
        output_dir / "report.html",
        title="vlmr1 demo: a tiny VLM learns to locate handwritten digits",
        summary_rows=rows,
        curve_png=curve,
        examples=examples(samples, before, after),
        settings={name: getattr(config, name) for name in SETTINGS},
        notes=[gain],
    )
    print_table(rows)
    print(gain)
    print(f"checkpoint {checkpoint}\ncurve      {curve}\nreport     {report}")
    print(f"{time.monotonic() - begin:.0f} s in all")


def held_out(config: GRPOConfig, output_dir: Path) -> Sequence[Sample]:
    """Write and load canvases of held-out scans."""
    folder = output_dir / "data"
    path = digits.write(folder, "held_out", HELD_OUT_ROWS, config.seed)
    question = Question(config.question_template, config.reward_funcs, config.accu_reward_method[0])
    return load_samples([path], [folder / "images"], question=question, check_images=False)


def measure(config: GRPOConfig, name: str, samples: Sequence[Sample]) -> Evaluation:
    return evaluate(load_model(name), load_processor(name), samples, max_completion_length=config.max_completion_length)


def summary(before: Evaluation, after: Evaluation, history: Sequence[dict[str, float]]) -> tuple[list[Row], str]:
    """Return the table, and a sentence on the gain in sampled accuracy with its interval."""
    tenth = max(1, len(history) // 10)
    first, last = history[:tenth], history[-tenth:]

    def means(name: str) -> tuple[str, str]:
        return tuple(f"{np.mean([step[name] for step in part]):.3f}" for part in (first, last))  # type: ignore[return-value]

    rows = [
        ("held-out greedy acc@0.5", f"{before.result.accuracy:.3f}", f"{after.result.accuracy:.3f}"),
        ("held-out greedy mean IoU", f"{before.result.mean_iou:.3f}", f"{after.result.mean_iou:.3f}"),
        ("sampled reward, accuracy", *means("rewards/accuracy/mean")),
        ("sampled reward, format", *means("rewards/format/mean")),
        ("completion length, tokens", *means("completion_length")),
        ("KL to the reference", *means("kl")),
    ]
    accuracy = [[step["rewards/accuracy/mean"] for step in part] for part in (first, last)]
    low, high = bootstrap(*accuracy)
    gain = np.mean(accuracy[1]) - np.mean(accuracy[0])
    return rows, (
        f"Sampled accuracy reward, last tenth of {len(history)} steps against the first: {gain:+.3f}, "
        f"bootstrap 95% interval {low:+.3f} to {high:+.3f}. Held-out figures are over {len(before.texts)} images."
    )


def bootstrap(first: Sequence[float], last: Sequence[float], *, draws: int = 10_000) -> tuple[float, float]:
    """95% interval of mean(last) - mean(first), steps resampled with replacement."""
    rng = np.random.default_rng(0)
    means = [rng.choice(part, (draws, len(part))).mean(1) for part in (np.asarray(first), np.asarray(last))]
    low, high = np.quantile(means[1] - means[0], [0.025, 0.975])
    return float(low), float(high)


def examples(samples: Sequence[Sample], before: Evaluation, after: Evaluation) -> list[Example]:
    """Return the first held-out images, not selected by result."""
    out = []
    for i, sample in enumerate(samples[:SHOWN]):
        true_box = solution_box(sample.solution)
        assert true_box is not None
        out.append(
            Example(
                image=Path(str(sample.images[0])),
                question=sample.messages[0]["content"][-1]["text"].split(" First output")[0],
                true_box=true_box,
                box_before=predicted_box(before.texts[i]),
                box_after=predicted_box(after.texts[i]),
                iou_before=before.result.ious[i],
                iou_after=after.result.ious[i],
                text_before=before.texts[i],
                text_after=after.texts[i],
            )
        )
    return out


def print_table(rows: Sequence[Row]) -> None:
    print(f"\n{'':28}{'before':>10}{'after':>10}")
    for name, before, after in rows:
        print(f"{name:28}{before:>10}{after:>10}")
    print()
