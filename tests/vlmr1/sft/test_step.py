"""The supervised update against its oracle: the model's own forward on each sequence alone, and plain cross-entropy."""

from typing import Any

import pytest
import torch

from tests.helpers.answers import plain, sample, trainer_of, update
from tests.helpers.steps import NAIVE, assert_equal_steps
from vlmr1.types import Sample

LONG = "<think>\nI see upper left 3, lower right 7.\n</think>\n<answer>\n{}\n</answer>"


@pytest.fixture
def model(model: Any) -> Any:
    """Random weights, three times as wide as usual: attention is far from uniform."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    return model


@pytest.fixture
def rows(image_files: Any) -> list[Sample]:
    """Several answers to a prompt, two images, one answer, no image; two rows of the same image."""
    one, two = image_files[112], image_files["odd"]
    return [
        sample(0, "Locate the digit 7.", [one], LONG.format("[1, 2]"), "7", LONG.format("[14, 28, 70, 84]")),
        sample(1, "Which of the two has a 4?", [one, two], "the second"),
        sample(2, "What is seven?", [], "a number", "a digit"),
        sample(3, "Locate the digit 3.", [one], "nowhere"),
    ]


SWITCHES = {"one pack": {}, "packs": {"tokens_per_pack": 120}, "naive": NAIVE, "no packs": {"pack": False}}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_an_update_equals_plain_cross_entropy(switches, rows, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, rows, **switches)
    loss, metrics, gradients = update(trainer)
    expected = plain(model, processor, rows)
    assert trainer.runner.counts["packs"] == {"one pack": 1}.get(
        next(iter(switches), "one pack"), trainer.runner.counts["packs"]
    )
    names = expected[1].keys() & metrics.keys()
    assert names >= {"tokens"} | (set() if switches is NAIVE else {"mean_token_accuracy"})
    assert_equal_steps(
        (loss, {n: metrics[n] for n in names}, gradients),
        (expected[0], {n: expected[1][n] for n in names}, expected[2]),
    )
