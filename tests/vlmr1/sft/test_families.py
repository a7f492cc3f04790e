"""The supervised update of every model family, and of other decoders that a family takes, against plain
cross-entropy of one sequence at a time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.answers import plain, sample, trainer_of, update
from tests.helpers.families import FAMILIES, Family, build
from vlmr1.types import Sample


def of_text(family: str, **text: Any) -> Family:
    """A family with another decoder."""
    return replace(FAMILIES[family], text=text, options=FAMILIES[family].options | {"tie_word_embeddings": False})


# Biases; norms of queries and keys; scaled embeddings; norms behind the layers; one projection; scaled residuals.
DECODERS = {
    "internvl-llama": of_text("internvl", model_type="llama", attention_bias=True, mlp_bias=True),
    "internvl-qwen3": of_text("internvl", model_type="qwen3"),
    "internvl-gemma": of_text("internvl", model_type="gemma"),
    "internvl-olmo2": of_text("internvl", model_type="olmo2"),
    "internvl-phi3": of_text("internvl", model_type="phi3"),
    "internvl-granite": of_text("internvl", model_type="granite", residual_multiplier=0.5, attention_multiplier=0.3),
    "idefics3-mistral": of_text("idefics3", model_type="mistral", sliding_window=None),
    "qwen2_5_vl-one-head-of-keys": replace(
        FAMILIES["qwen2_5_vl"], text=FAMILIES["qwen2_5_vl"].text | {"num_key_value_heads": 1}
    ),
}
KINDS: dict[str, Any] = {name: name for name in FAMILIES} | DECODERS


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(KINDS[request.param], tmp_path_factory.mktemp("kinds") / request.param)


@pytest.fixture
def rows(image_files: Any) -> list[Sample]:
    """One to three answers to a prompt; one image, two, and none."""
    return [
        sample(0, "Locate the digit 7.", [image_files["tall"]], "at 1, 2", "7", "there, anywhere on this canvas"),
        sample(1, "What is seven?", [], "a number", "a digit, if anywhere"),
        sample(2, "Which has a 4?", [image_files[84], image_files["odd"]], "user assistant"),
    ]


def test_an_update_equals_plain_cross_entropy(rows, model, processor, tmp_path):
    sizes = trainer_of(model, processor, tmp_path, rows)
    tokens = [sizes.runner.tokens_of(sizes.train_dataset[place]) for place in range(len(rows))]
    trainer = trainer_of(model, processor, tmp_path, rows, tokens_per_pack=sum(tokens) - 1)
    loss, metrics, gradients = update(trainer)
    loss_, metrics_, gradients_ = plain(model, processor, rows)
    assert trainer.runner.counts["packs"] == 2 and metrics["tokens"] == metrics_["tokens"]
    assert loss == pytest.approx(loss_, rel=1e-5)
    assert metrics["mean_token_accuracy"] == pytest.approx(metrics_["mean_token_accuracy"], rel=1e-6)
    assert gradients.keys() == gradients_.keys() == {name for name, _ in model.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients_.values())
    for name, gradient in gradients_.items():
        error, scale = float((gradients[name] - gradient).abs().max()), float(gradient.abs().max())
        # A bias of keys moves nothing: its gradient is rounding, 1e-10 of the largest.
        assert error <= 1e-5 * max(scale, 1e-4 * largest), (name, error / scale)
