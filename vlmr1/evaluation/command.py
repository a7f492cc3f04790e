"""`vlmr1 evaluate`: one table on the console, the completions in a file."""

from __future__ import annotations

import argparse
import json

from vlmr1.data.samples import load_samples
from vlmr1.data.templates import question_text
from vlmr1.evaluation.evaluate import evaluate
from vlmr1.models import load_model, load_processor
from vlmr1.rewards.registry import check_samples
from vlmr1.run import model_path


def evaluate_command(options: argparse.Namespace) -> None:
    """Greedy decoding of every row: acc@0.5, mean IoU, share with the format, share without a box."""
    question = question_text(options.question_template)
    samples = load_samples([options.data], [options.images], question=question, check_images=True)
    check_samples(["accuracy"], samples)
    name = model_path(options.model)
    evaluation = evaluate(
        load_model(name),
        load_processor(name),
        samples,
        max_completion_length=options.max_completion_length,
        batch_size=options.batch_size,
    )
    result = evaluation.result
    print(f"{len(samples)} rows of {options.data}")
    print(f"acc@0.5 {result.accuracy:.4f}  mean IoU {result.mean_iou:.4f}")
    print(f"format {result.format_share:.4f}  no box {result.parse_failure_share:.4f}")
    if options.out:
        with options.out.open("w", encoding="utf-8") as file:
            for sample, text, iou in zip(samples, evaluation.texts, result.ious, strict=True):
                record = {
                    "source": sample.source,
                    "completion": text,
                    "solution": sample.solution,
                    "iou": iou,
                }
                file.write(json.dumps(record) + "\n")
