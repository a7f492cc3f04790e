"""The supervised update against its oracle: the model's own forward on each sequence alone, and plain cross-entropy."""

from typing import Any

import pytest
import torch

from tests.helpers.answers import plain, sample, trainer_of, update
from tests.helpers.steps import NAIVE, assert_equal_steps
from vlmr1.sft.evaluation import evaluate_loss
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


CASES = {  # settings, and the packs of an update
    "one pack": ({}, 1),
    "two packs": ({"tokens_per_pack": 180}, 2),
    "naive": (NAIVE, 4),
    "no packs": ({"pack": False}, 4),
}


@pytest.mark.parametrize("settings, packs", CASES.values(), ids=CASES.keys())
def test_an_update_equals_plain_cross_entropy(settings, packs, rows, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, rows, **settings)
    loss, metrics, gradients = update(trainer)
    loss_, metrics_, gradients_ = plain(model, processor, rows)
    assert trainer.runner.counts["packs"] == packs
    shown = {name: metrics[name] for name in metrics_ if name in metrics}
    assert shown.keys() == metrics_.keys() - ({"mean_token_accuracy"} if settings is NAIVE else set())
    assert_equal_steps((loss, shown, gradients), (loss_, {name: metrics_[name] for name in shown}, gradients_))


def test_the_loss_of_an_evaluation(rows, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, rows[:1], prompts_per_device=2)
    loss, metrics, _ = plain(model, processor, rows)
    values = evaluate_loss(trainer, rows)
    assert values is not None and values["eval/loss"] == pytest.approx(loss, rel=1e-5)
    assert values["eval/mean_token_accuracy"] == pytest.approx(metrics["mean_token_accuracy"], rel=1e-5)


def test_an_evaluation_keeps_the_images_of_one_batch(rows, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, rows, prompts_per_device=1, freeze_vision=True)
    kept, features = [], trainer.features
    assert features is not None
    values = evaluate_loss(trainer, rows, lambda: kept.append(len(features.kept)))  # type: ignore[reportArgumentType]
    assert values is not None and kept == [0] * len(rows) and not features.kept
    trainer.model.train()
    assert evaluate_loss(trainer, rows, lambda: True) is None
    assert trainer.model.training


def test_an_update_of_an_adapter(rows, model, processor, tmp_path):
    trainer = trainer_of(model, processor, tmp_path, rows, use_peft=True, lora_r=4, lora_alpha=8)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    loss, _, gradients = update(trainer)
    loss_, _, gradients_ = plain(trainer.model, processor, rows)
    assert all("lora_" in name for name in gradients)
    assert_equal_steps((loss, {}, gradients), (loss_, {}, gradients_))


def test_a_pass_that_runs_out_of_memory_is_repeated_in_smaller_packs(rows, model, processor, tmp_path):
    trainer, sizes = trainer_of(model, processor, tmp_path, rows), []
    loss_of = trainer.policy.loss

    def limited(pack: Any, objective: Any) -> Any:
        sizes.append(len(pack.input_ids))
        if len(pack.input_ids) > 200:
            raise torch.OutOfMemoryError("no room")
        return loss_of(pack, objective)

    trainer.policy.loss = limited
    loss, _, gradients = update(trainer)
    loss_, _, gradients_ = plain(model, processor, rows)
    assert_equal_steps((loss, {}, gradients), (loss_, {}, gradients_))
    assert max(sizes) > 200 and trainer.totals()["out_of_memory"] >= 1
