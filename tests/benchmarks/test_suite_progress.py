"""A peer that has the device to itself: what is measured of it when the run is stopped, and that ours are gone."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.device import Ceilings
from benchmarks.suite.context import Context
from benchmarks.suite.peers import Peers


def context(folder: Path) -> Context:
    options: Any = SimpleNamespace(device="cuda", rounds=3, left_out={})
    return Context(options, "tiny", folder, Ceilings(1.0, 1.0))


def test_a_peer_that_is_stopped_leaves_its_rounds(tmp_path: Path):
    made = context(tmp_path)
    made.progress.arms["naive"] = {"seconds": [3.0, 3.0, 3.0]}
    answers = iter([9.0, 1.0, 2.0])  # the first is not counted

    def ask(request: str) -> float:
        if (seconds := next(answers, None)) is None:
            raise KeyboardInterrupt
        return seconds

    peers, worker = Peers(made, "step"), SimpleNamespace(ask=ask)
    peers.launched["trl"] = worker  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        peers.alone("trl", tokens=8, base="naive")
    arms = made.progress.so_far()["arms"]
    assert arms["naive"]["seconds"] == [3.0, 3.0, 3.0]
    assert arms["trl"].items() >= {"seconds": [1.0, 2.0], "tokens": 8, "base": "naive", "in_turn": False}.items()


def test_nothing_holds_our_arms_then(tmp_path: Path):
    class Arms:
        pass

    arms, made = Arms(), context(tmp_path)
    found = weakref.ref(arms)
    made.progress.rounds(lambda name, samples, arms=arms: None)
    del arms
    assert found() is not None
    made.drop_bed()
    assert found() is None
