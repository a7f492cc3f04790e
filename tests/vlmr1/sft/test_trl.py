"""TRL's own SFTTrainer on the same rows: losses, metrics and weights of accumulated updates; and a script of TRL that
runs with another import."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vlmr1
from tests.helpers.answers import assert_moved_alike
from tests.helpers.api import tiny
from vlmr1.models import load_model, load_processor

__all__ = ["tiny"]
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
SIZES = ((84, 56), (56, 56), (112, 84))


def rows(count: int) -> list[dict[str, Any]]:
    """Prompts with one image, two or none, some with a message of the system; answers of 1 to 34 words."""
    random = np.random.default_rng(0)
    found = []
    for place in range(count):
        pixels = [random.integers(0, 255, (*SIZES[(place + i) % 3], 3), dtype=np.uint8) for i in range(place % 3)]
        prompt = [{"role": "user", "content": f"Where is {place}?"}]
        if place % 4 == 1:
            prompt.insert(0, {"role": "system", "content": "Answer briefly."})
        answer = " ".join(f"{place}, {word}" for word in range(1 + place * 11 % 34))
        completion = [{"role": "assistant", "content": answer}]
        found.append({"prompt": prompt, "completion": completion, "images": list(map(Image.fromarray, pixels))})
    return found


def trained(kind: Any, tiny: Path, output: Path, **given: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Logs and weights of three updates of four rows each by the trainer of a library."""
    known: dict[str, Any] = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True)
    known |= dict(num_train_epochs=1, logging_steps=1, gradient_checkpointing=False, max_length=150)
    known |= dict(optim="sgd", learning_rate=0.1)
    model = load_model(tiny)
    trainer = kind.SFTTrainer(
        model=model,
        args=kind.SFTConfig(str(output), **known | given),
        train_dataset=datasets.Dataset.from_list(rows(12)),
        processing_class=load_processor(tiny),
    )
    # Qwen2.5-VL's class says that it takes no count of tokens: TRL would take the mean of the means of the passes.
    trainer.model_accepts_loss_kwargs = True
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log], dict(model.named_parameters())


@pytest.mark.parametrize(("size", "passes"), [(4, 1), (2, 2)], ids=["one pass", "two passes"])
def test_updates_are_those_of_trl(size, passes, tiny, tmp_path):
    """Rows in the same order, unequal lengths, one answer cut at max_length; two passes count their tokens together."""
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": passes}
    (theirs, expected), (ours, found) = (trained(kind, tiny, tmp_path, **sizes) for kind in (trl, vlmr1))
    assert len(theirs) == len(ours) == 3 and sum(log["truncated"] for log in ours) > 0
    means = {"entropy", "mean_token_accuracy"} if passes > 1 else set()  # TRL's are means over passes
    for one, other in zip(ours, theirs, strict=True):
        names = other.keys() - means
        assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, rel=1e-5)
    assert_moved_alike(found, expected, dict(load_model(tiny).named_parameters()))
