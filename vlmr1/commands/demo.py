"""`vlmr1 demo`: GRPO on the embedded model and data, with a table before and after, a curve and a report."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmr1.commands.arguments import parse_config
from vlmr1.commands.controls import CONTROLS, read_controls, run_controls
from vlmr1.commands.held_out import changes, checkpoint_of, held_out, measure
from vlmr1.commands.train import train
from vlmr1.evaluation.bootstrap import Metric
from vlmr1.evaluation.evaluate import Evaluation
from vlmr1.lifecycle.disk import check_output_dir
from vlmr1.report.curves import reward_curve
from vlmr1.report.demo import Example, write_report
from vlmr1.report.progress import read_metrics
from vlmr1.rewards.answer import predicted_box, solution_box
from vlmr1.telemetry.phases import Phases
from vlmr1.tiny import DIGITS, TINY
from vlmr1.types import Sample

WIDTH = 80  # columns of the terminal
SHOWN = 12  # held-out images in the report
SETTINGS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "beta", "epsilon", "loss_type")
SETTINGS += ("num_generations", "prompts_per_device", "temperature", "seed")
Row = tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, help="default: output/demo-SEED")
    parser.add_argument("--controls", action="store_true", help=f"train what the table compares with: {CONTROLS.name}")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    name = "controls" if options.controls else "demo"
    work = run_controls if options.controls else demo
    work(options.seed, options.output_dir or Path("output") / f"{name}-{options.seed}", rest)


def demo(seed: int, output_dir: Path, words: Sequence[str] = ()) -> None:
    """Train as `vlmr1 train --recipe tiny-digits` does, between two evaluations on held-out images.

    `words` are further settings, as on the command line."""
    phases = Phases()
    with phases("prepare"):
        arguments = ["--output_dir", str(output_dir), "--seed", str(seed), "--data_file_paths", DIGITS]
        arguments += ["--write_report", "false"]  # of the run alone
        config = parse_config(arguments, recipe="tiny-digits", changes=words)
        config.check_device()
        check_output_dir(output_dir)
        samples = held_out(config, output_dir)
    with phases("evaluate"):
        before = measure(config, str(config.model_name_or_path), samples)
    print(f"before: {scores_line(before)}, {len(samples)} held-out images", flush=True)
    with phases("train"):
        train(config)
    with phases("evaluate"):
        after = measure(config, checkpoint_of(output_dir), samples)
    with phases("report"):
        history = read_metrics(output_dir)
        controls, note = read_controls(seed) if config.model_name_or_path == TINY else ({}, "")
        head, rows = table(before, after, controls)
        notes = [sentence(before, after, len(history)), f"{len(samples)} held-out images. {note}".strip()]
        report = write_report(
            output_dir / "report.html",
            title="vlmr1 demo: a tiny VLM learns to locate handwritten digits",
            summary_head=head,
            summary_rows=rows,
            curve_png=reward_curve(history, output_dir / "curve.png"),
            examples=examples(samples, before, after),
            settings={name: getattr(config, name) for name in SETTINGS},
            notes=notes,
        )
    paragraphs = [textwrap.fill(note, WIDTH) for note in notes]
    print("", *aligned([head, *rows]), "", *paragraphs, "", sep="\n")
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in phases.seconds.items())
    print(f"seconds    {seconds}; {sum(phases.seconds.values()):.0f} in all")
    print(f"open       {report}")


def scores_line(found: Evaluation) -> str:
    return ", ".join(f"{name} {found.rows[name].mean():.3f}" for name in ("greedy mean IoU", "sampled mean IoU"))


def table(before: Evaluation, after: Evaluation, controls: Mapping[str, Mapping[str, float]]) -> tuple[Row, list[Row]]:
    """Return the head and the rows: a metric before, after, its change, and after each control instead."""
    head = ("", "before", "GRPO", "change (95% interval)", *controls)
    rows = []
    for name, change in changes(before, after).items():
        means = [f"{found.rows[name].mean():.3f}" for found in (before, after)]
        rows.append((name, *means, with_interval(change), *(f"{arm[name]:.3f}" for arm in controls.values())))
    return head, rows


def with_interval(change: Metric) -> str:
    return f"{change.value:+.3f} ({change.low:.3f} to {change.high:.3f})"


def sentence(before: Evaluation, after: Evaluation, updates: int) -> str:
    """The result in one sentence, with the greedy IoUs."""
    ious = [found.rows["greedy mean IoU"].mean() for found in (before, after)]
    went = f"the IoU of held-out boxes went from {ious[0]:.2f} to {ious[1]:.2f} in {updates} updates"
    recovered = ious[1] > ious[0]
    return f"GRPO recovered what sloppy labels had removed: {went}." if recovered else f"GRPO did not help: {went}."


def aligned(rows: Sequence[Row]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]


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
