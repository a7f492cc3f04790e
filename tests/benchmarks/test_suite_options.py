"""The suite's command line: what it chooses by itself, and what it refuses by name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.model import SHAPES
from benchmarks.suite import options, sizes
from benchmarks.suite.bed import Bed
from benchmarks.suite.options import SECTIONS, parse
from vlmr1.errors import SettingError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="defaults of a CPU")
WHY_NOT = {"vlm-r1": None, "trl": None, "trl+liger": "Liger has no kernels for cpu"}


@pytest.fixture(autouse=True)
def known_peers(monkeypatch: Any):
    """Three peers, one of which cannot run on a CPU."""

    def info(reason: str | None) -> Any:
        return SimpleNamespace(label="", note="", why_not=lambda device: reason if device == "cpu" else None)

    module: Any = ModuleType("benchmarks.peers.steps")
    module.PEERS = {name: info(reason) for name, reason in WHY_NOT.items()}
    monkeypatch.setitem(sys.modules, "benchmarks.peers.steps", module)


def test_defaults():
    chosen = parse([])
    assert (chosen.only, chosen.shapes, chosen.dtype) == (SECTIONS, ("bench",), "float32")
    assert (chosen.rounds, chosen.threads, chosen.quick, str(chosen.out)) == (5, 2, False, "benchmark-results")
    assert chosen.peers == ("vlm-r1", "trl")
    assert (chosen.peer_limit, parse(["--peer-limit", "2.5"]).peer_limit) == (1800, 2.5)
    assert chosen.left_out == {"trl+liger": "Liger has no kernels for cpu"}


def test_quick_is_tiny_with_few_rounds_unless_told_otherwise():
    assert (parse(["--quick"]).shapes, parse(["--quick"]).rounds) == (("tiny",), 3)
    told = parse(["--quick", "--shapes", "bench", "tiny", "--rounds", "7"])
    assert (told.shapes, told.rounds) == (("bench", "tiny"), 7)


PEERS = {"none": ((), {}), "trl": (("trl",), {}), "trl,vlm-r1": (("trl", "vlm-r1"), {})}


@pytest.mark.parametrize(("text", "expected"), PEERS.items(), ids=PEERS.keys())
def test_peers_by_name(text: str, expected: tuple):
    chosen = parse(["--peers", text])
    assert (chosen.peers, chosen.left_out) == expected


def test_no_peer_is_asked_for_where_there_is_none():
    assert parse(["--only", "rollout", "ops"]).peers == ()


REFUSED = {
    "section": (["--only", "ops", "speed"], "--only: 'speed' is unknown; known: ops, attention"),
    "shape": (["--shapes", "13b"], "--shapes: '13b' is unknown; known: tiny, bench, 3b, 7b"),
    "peer": (["--peers", "trl,vlmr1"], "--peers: 'vlmr1' is unknown; known: vlm-r1, trl, trl"),
    "peer that cannot run": (["--peers", "trl+liger"], "--peers trl.liger cannot run here: Liger has no kernels"),
    "none and a peer": (["--peers", "none,trl"], "--peers: 'none' is unknown"),
    "peers without effect": (
        ["--only", "ops", "rollout", "--peers", "trl"],
        "--peers has no effect with --only ops rol",
    ),
    "rounds": (["--rounds", "0"], "--rounds is 0"),
    "threads": (["--threads", "0"], "--threads is 0"),
    "peer limit": (["--peer-limit", "0"], "--peer-limit is 0: it must be above 0"),
    "peer limit without end": (["--peer-limit", "inf"], "--peer-limit is inf: it must be above 0, and at most 1000000"),
    "peer limit without peers": (["--peers", "none", "--peer-limit", "5"], "--peer-limit has no effect"),
    "peer limit of sections without": (["--only", "ops", "--peer-limit", "5"], "--peer-limit has no effect"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(words: list[str], message: str):
    with pytest.raises(SettingError, match=message):
        parse(words)


def test_threads_of_a_gpu_run_are_refused(monkeypatch: Any):
    monkeypatch.setattr(options, "default_device", lambda: "cuda")
    with pytest.raises(SettingError, match="--threads has no effect on a GPU"):
        parse(["--threads", "4"])


def test_a_shape_that_does_not_fit_is_refused_with_its_bytes(monkeypatch: Any):
    monkeypatch.setattr(options, "free_bytes", lambda device: 2**30)
    with pytest.raises(SettingError, match=r"--shapes 3b needs \d+ MiB in float32, 1024 MiB are free"):
        parse(["--shapes", "3b"])
    assert parse(["--shapes", "3b", "--only", "ops"]).shapes == ("3b",)  # whose ops need no model


def test_a_gpu_gets_the_largest_shape_that_fits(monkeypatch: Any):
    monkeypatch.setattr(options, "default_device", lambda: "cuda")
    for gib, shape in ((139, "7b"), (78, "3b"), (20, "bench")):
        monkeypatch.setattr(options, "free_bytes", lambda device, gib=gib: gib * 2**30)
        assert parse(["--peers", "none"]).shapes == (shape,)
    assert parse(["--peers", "none"]).dtype == "bfloat16"


def test_sizes_are_known_without_a_model(tmp_path: Path):
    bed = Bed(tmp_path, SHAPES["tiny"], device="cpu", dtype=torch.float32, prompts=sizes.PROMPTS)
    wanted = sizes.of(SHAPES["tiny"], bed.prompts[1], bed.model)
    assert wanted["parameters"] == sum(parameter.numel() for parameter in bed.model.parameters())
    assert sizes.without_model(tmp_path, SHAPES["tiny"]) == wanted


# Of the published checkpoints, by their safetensors: 3.75B and 8.29B.
PARAMETERS = {"3b": 3_754_622_976, "7b": 8_292_166_656}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items(), ids=PARAMETERS.keys())
def test_parameters_of_a_shape(name: str, count: int):
    assert sizes.parameters(SHAPES[name]) == count


def test_bytes_of_a_step():
    """Policy, reference, gradient, two moments: 5 x 4 bytes a weight; and six times the logits of a group."""
    tiny = SHAPES["tiny"]
    logits = 4 * 16 * 490 * 4
    assert sizes.needed_bytes(tiny, "float32") == 20 * sizes.parameters(tiny) + 6 * logits
    assert sizes.needed_bytes(tiny, "bfloat16") == 12 * sizes.parameters(tiny) + 6 * logits
