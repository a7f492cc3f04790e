"""Models that one rank makes alone, under ZeRO-3."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from transformers.integrations.deepspeed import (
    HfDeepSpeedConfig,
    deepspeed_config,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)

from vlmr1.distributed.launch import CONFIGS
from vlmr1.distributed.preflight import undivided


@pytest.fixture
def zero3() -> Iterator[HfDeepSpeedConfig]:
    """What transformers goes by when it makes a model; it holds the configuration weakly."""
    pytest.importorskip("deepspeed")
    yield HfDeepSpeedConfig(json.loads((CONFIGS / "zero3.json").read_text(encoding="utf-8")))
    unset_hf_deepspeed_config()


@pytest.mark.parametrize("failing", [False, True], ids=["done", "failed"])
def test_a_model_is_made_whole(failing, zero3):
    assert is_deepspeed_zero3_enabled()
    try:
        with undivided(SimpleNamespace(dschf=zero3)):
            assert not is_deepspeed_zero3_enabled()
            if failing:
                raise OSError
    except OSError:
        pass
    assert is_deepspeed_zero3_enabled()
    assert deepspeed_config() is zero3.config


def test_without_a_plugin_nothing_changes(zero3):
    with undivided(None):
        assert is_deepspeed_zero3_enabled()
