"""Held-out images of the embedded data set, and how well a model locates digits on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmr1.config import GRPOConfig
from vlmr1.data.samples import load_samples
from vlmr1.evaluation.bootstrap import Metric, ratio
from vlmr1.evaluation.evaluate import Evaluation, evaluate
from vlmr1.lifecycle.checkpoint import last_complete
from vlmr1.models import load_model, load_processor
from vlmr1.rewards.question import Question
from vlmr1.tiny import digits, model_path
from vlmr1.types import Sample

ROWS = 400
DRAWS = 4  # completions of an image, beside the greedy one
AT_ONCE = 100  # images that are decoded together


def held_out(config: GRPOConfig, output_dir: Path) -> Sequence[Sample]:
    """Write and load canvases of held-out scans; they depend on the seed."""
    folder = output_dir / "data"
    path = digits.write(folder, "held_out", ROWS, config.seed)
    question = Question(config.question_template, config.reward_funcs, config.accu_reward_method[0])
    return load_samples([path], [folder / "images"], question=question, check_images=False)


def measure(config: GRPOConfig, name: str, samples: Sequence[Sample]) -> Evaluation:
    """Evaluate a model by its name or directory: one greedy completion and DRAWS sampled ones an image."""
    model, processor = load_model(model_path(name)), load_processor(model_path(name))
    length = config.max_completion_length
    return evaluate(
        model, processor, samples, max_completion_length=length, batch_size=AT_ONCE, draws=DRAWS, seed=config.seed
    )


def checkpoint_of(output_dir: Path) -> str:
    """Return the last checkpoint of a run that has ended."""
    checkpoint = last_complete(output_dir)
    if checkpoint is None:
        raise RuntimeError(f"the run ended without a checkpoint in {output_dir}")
    return str(checkpoint)


def changes(before: Evaluation, after: Evaluation) -> Mapping[str, Metric]:
    """Return the change of each metric with its paired bootstrap interval: images are resampled, with their answers
    before and after."""
    return {name: ratio((after.rows[name] - values).tolist()) for name, values in before.rows.items()}
