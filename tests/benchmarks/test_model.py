"""The benchmarks' tiny shape is the embedded tiny model."""

from __future__ import annotations

from benchmarks.model import SHAPES, config_of
from vlmr1.tiny import build


def test_the_tiny_shape_is_that_of_the_embedded_model():
    tokens = build.tokenizer()
    assert config_of(SHAPES["tiny"], tokens).to_dict() == build.config(tokens).to_dict()
    assert SHAPES["tiny"].text["vocab_size"] == len(tokens)
