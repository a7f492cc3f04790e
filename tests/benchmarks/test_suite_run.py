"""Runs of the suite on a very small model: the result file, checks that fail, runs that are cut short."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import model as bench_model
from benchmarks.device import Ceilings
from benchmarks.suite import __main__ as suite
from benchmarks.suite import ablation, page
from benchmarks.suite import context as suite_context
from benchmarks.suite import run as suite_run
from benchmarks.suite import update as suite_update
from benchmarks.suite.arms import TrainerArm
from benchmarks.suite.reading import read

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="expects a CPU's arms")
TEXT = bench_model.TINY_TEXT | {"num_hidden_layers": 1, "hidden_size": 96, "intermediate_size": 96}
VISION = bench_model.TINY_VISION | {"depth": 2, "fullatt_block_indexes": [1], "out_hidden_size": 96}
SMALL = replace(
    bench_model.SHAPES["tiny"],
    text=TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    vision=VISION,
    image_px=56,
    num_generations=2,
    completion_length=5,
)
ARM = {"label", "group", "base", "settings", "seconds", "tokens", "note"}
CASE = {"op", "case", "flops", "moved_bytes", "accumulator_bytes", "ceilings", "arms", "skipped", "seconds"}
CELL = {"num_generations", "prompt_tokens", "image_tokens", "completion_tokens", "seconds", "ratio", "predicted"}
SIZES = {"prompts": 2, "num_generations": 2, "image_tokens": 4, "completion_tokens": 5}
# Answers of a peer's worker, by the line it is asked.
ANSWERS = {
    "seconds": 0.5,
    "peak_mib": 7.5,
    "phases": {"rollout": 0.2, "update": 0.3},
    "settings": {"attention": "sdpa", "versions": {"torch": "2"}},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: Any):
    """The tiny shape made smaller, ceilings that are known, and no report."""
    monkeypatch.setitem(bench_model.SHAPES, "tiny", SMALL)
    monkeypatch.setitem(suite_update.GRIDS, "tiny", ((2,), (56, 112)))
    monkeypatch.setattr(suite_run, "ceilings", lambda *_: Ceilings(10.0, 0.1))
    monkeypatch.setattr(suite, "report", lambda path: [path])


def run(out: Path, *words: str, peers: str = "none", limit: float | None = None) -> int:
    chosen = ["--peers", peers] if {"step", "update"} & set(words) else []
    chosen += ["--peer-limit", str(limit)] if limit is not None else []
    return suite.main(["--quick", "--rounds", "2", "--threads", "1", "--out", str(out), *chosen, "--only", *words])


def result(out: Path) -> dict[str, Any]:
    (path,) = out.glob("*.json")
    assert path.stem.endswith("-1-threads-tiny")
    return json.loads(path.read_text())["figures"]


def peers_that_answer(monkeypatch: Any, **answers: dict[str, Any]) -> None:
    """Peers whose workers answer each line with what is given."""
    program = "import sys, json\nfor line in sys.stdin: print(json.dumps(json.loads({!r})[line.strip()]), flush=True)"
    module: Any = ModuleType("benchmarks.peers.steps")
    info = SimpleNamespace(label="a peer", note="its own attention", why_not=lambda device: None)
    module.PEERS = dict.fromkeys(answers, info)
    module.command = lambda name, **_: [sys.executable, "-c", program.format(json.dumps(answers[name]))]
    monkeypatch.setitem(sys.modules, "benchmarks.peers.steps", module)


@pytest.mark.slow
def test_steps(monkeypatch: Any, tmp_path: Path, capsys: Any):
    peers_that_answer(monkeypatch, trl=ANSWERS, broken={})
    assert run(tmp_path, "step", peers="trl,broken") == 0
    figures = result(tmp_path)
    assert (figures["suite"], figures["device"], figures["threads"], figures["quick"]) == (1, "cpu", 1, True)
    assert (figures["shape"], figures["dtype"], figures["rounds"], figures["warmup"]) == ("tiny", "float32", 2, 1)
    assert figures["ceilings"] == {"copy_gb_s": 10.0, "matmul_tflop_s": 0.1}
    assert figures["sizes"].items() >= SIZES.items() and figures["sizes"]["parameters"] > 100_000
    assert figures["section_seconds"]["step"] > 0
    arms = figures["sections"]["step"]["arms"]
    assert {"naive", "share_vision", "share_prompt", "pack", "native", "shared", "frozen", "flat", "all"} < arms.keys()
    for name, arm in arms.items():
        assert arm.keys() >= ARM and len(arm["seconds"]) == 2 and arm["base"] in arms
        assert arm["tokens"] == 2 * 2 * 5
        if arm["group"] == "ablation":
            assert "peak_mib" in arm and set(map(len, arm["phases"].values())) == {2}
            assert arm["phases"].keys() == {"rollout", "reference", "reward", "forward", "backward", "update"}
            assert arm["check"] == pytest.approx(arms[arm["base"]]["check"], rel=1e-4), name
    assert arms["trl"].items() >= {"seconds": [0.5, 0.5], "peak_mib": 7.5, "group": "peer", "base": "naive"}.items()
    assert arms["trl"]["settings"] == {"attention": "sdpa"}
    assert arms["trl"]["phases"] == {"rollout": [0.2], "update": [0.3]}
    assert figures["skipped"]["step/broken"] == "its process ended with status 1: KeyError: 'seconds'"
    assert figures["skipped"]["step/cuda_graphs"] == "needs a GPU"
    assert "step/naive: " in capsys.readouterr().out


@pytest.mark.slow
def test_all_other_sections(monkeypatch: Any, tmp_path: Path):
    other = ANSWERS | {"figures": {"loss": 1.0, "grad_norm": 2.0}}
    peers_that_answer(monkeypatch, vlm=other)
    assert run(tmp_path, "ops", "attention", "rollout", "update", "memory", peers="vlm") == 0
    figures = result(tmp_path)
    sections = figures["sections"]
    assert sections.keys() == {"ops", "attention", "rollout", "update", "memory"} == figures["section_seconds"].keys()
    ops = {**sections["ops"], **sections["attention"]}
    assert {case["op"] for case in ops.values()} == {
        *("linear_grpo_loss", "linear_logprob", "grpo_loss", "group_advantages"),
        *("shared_prefix_attention", "varlen_attention", "shared_prefix_decode"),
    }
    for key, case in ops.items():
        assert case.keys() == CASE and key == f"{case['op']} {case['case']}"
    rollout = sections["rollout"]["arms"]
    assert rollout.keys() == {"transformers", "native"} and rollout["native"]["base"] == "transformers"
    # decoder and head in bytes, at 10 GB/s, four decode steps of a completion of five tokens
    assert 0 < rollout["native"]["floor_share"] < 1 and "floor_share" not in rollout["transformers"]
    update = sections["update"]
    assert update["arms"].keys() == {"naive", "repeated", "all"}
    assert all(arm["utilization"] > 0 for arm in update["arms"].values())
    assert "not the same update: loss is 1.0 in it" in figures["skipped"]["update/vlm"]
    assert [cell["image_tokens"] for cell in update["grid"]] == [4, 16]
    for cell in update["grid"]:
        assert cell.keys() == CELL and cell["seconds"].keys() == {"naive", "all"}
        assert 1 < cell["predicted"] < 2 and cell["ratio"].keys() == {"value", "low", "high"}
    memory = sections["memory"]["arms"]
    assert {"naive", "all", "pack"} < memory.keys() and "shared" not in memory
    for arm in memory.values():
        assert arm.keys() == {"label", "peak_mib", "phases", "timeline"}
        assert arm["peak_mib"] >= max(arm["phases"].values()) and {"rollout", "backward"} < arm["phases"].keys()
        assert all(len(point) == 3 for point in arm["timeline"])


@pytest.mark.parametrize("section", ["step", "update"])
def test_arms_that_disagree_fail_the_run_before_anything_is_timed(
    section: str, monkeypatch: Any, tmp_path: Path, capsys: Any
):
    real = TrainerArm.figures

    def figures(self: TrainerArm, groups: Any) -> dict[str, float]:
        found = real(self, groups)
        return found | {"grad_norm": 1.001 * found["grad_norm"]} if self.arm.name == "all" else found

    monkeypatch.setattr(TrainerArm, "figures", figures)
    monkeypatch.setattr(TrainerArm, "step", lambda self: pytest.fail("it was timed"))
    assert run(tmp_path, section) == 1
    assert "refused: grad_norm is" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_a_run_cut_short_leaves_the_sections_that_were_finished(monkeypatch: Any, tmp_path: Path, capsys: Any):
    def stopped(context: Any) -> Any:
        raise KeyboardInterrupt

    done = {"arms": {"transformers": {"seconds": [1.0]}}}
    monkeypatch.setattr(suite_run, "RUN", {"rollout": lambda context: done, "step": stopped})
    assert run(tmp_path, "rollout", "step") == 130
    figures = result(tmp_path)
    assert figures["sections"] == {"rollout": done}
    assert (figures["complete"], figures["unfinished"]) == (False, ["step"])
    assert "stopped" in capsys.readouterr().err


def few_arms(monkeypatch: Any, *names: str) -> None:
    made = ablation.arms("cpu", torch.float32, SMALL)[0]
    few = {name: made[name] for name in names}
    monkeypatch.setattr(ablation, "arms", lambda *_: (few, {}))


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupted() -> None:
    raise KeyboardInterrupt


# How, at which call of a step, and the samples that are left. Each arm makes a step first; then naive, all, all, naive.
STOPPED = {
    "SIGTERM in the second round": (terminated, 6, {"naive": 1, "all": 1}),
    "Ctrl-C in the first": (interrupted, 4, {"naive": 1}),
    "SIGTERM while memory is measured": (terminated, 8, {"naive": 2, "all": 2}),
}


@pytest.mark.parametrize(("how", "call", "samples"), STOPPED.values(), ids=STOPPED.keys())
def test_a_section_cut_short_leaves_its_samples(
    how: Callable[[], None], call: int, samples: dict[str, int], monkeypatch: Any, tmp_path: Path, capsys: Any
):
    few_arms(monkeypatch, "naive", "all")
    real, calls = TrainerArm.step, iter(range(1, 20))

    def step(self: TrainerArm) -> None:
        if next(calls) == call:
            how()
        real(self)

    monkeypatch.setattr(TrainerArm, "step", step)
    assert run(tmp_path, "step", "memory") == 130
    (path,) = tmp_path.iterdir()  # nothing half written beside it
    figures = read(path)["figures"]
    assert (figures["complete"], figures["unfinished"]) == (False, ["step", "memory"])
    assert {name: len(arm["seconds"]) for name, arm in figures["sections"]["step"]["arms"].items()} == samples
    assert figures["sections"]["step"]["arms"]["naive"].keys() >= ARM | {"phases", "check"}
    assert figures["sections"].keys() == figures["section_seconds"].keys() == {"step"}
    assert f"what was measured is kept in {path}" in capsys.readouterr().out
    page.write(path)
    assert "stopped before its end: not complete are step, memory" in path.with_suffix(".md").read_text()


def test_a_run_that_is_stopped_before_it_measures_writes_nothing(monkeypatch: Any, tmp_path: Path):
    monkeypatch.setattr(suite_run, "RUN", {"ops": lambda context: interrupted()})
    assert run(tmp_path, "ops") == 130
    assert not list(tmp_path.iterdir())


def test_a_peer_that_hangs_is_left_out_and_the_run_goes_on(monkeypatch: Any, tmp_path: Path):
    """Its second sample never ends."""
    few_arms(monkeypatch, "naive", "all")
    peers_that_answer(monkeypatch, trl=ANSWERS, hangs=ANSWERS)
    module: Any = sys.modules["benchmarks.peers.steps"]
    hang = "import time\nprint(input() and 0.5, flush=True)\nwhile True: time.sleep(60)"
    command = module.command
    module.command = lambda name, **_: [sys.executable, "-c", hang] if name == "hangs" else command(name)
    assert run(tmp_path, "step", peers="trl,hangs", limit=5) == 0
    figures = result(tmp_path)
    arms = figures["sections"]["step"]["arms"]
    assert arms.keys() == {"naive", "all", "trl"} and all(len(arm["seconds"]) == 2 for arm in arms.values())
    assert figures["skipped"]["step/hangs"] == "no answer in 5 s: its process was ended"
    assert figures["complete"] is True and figures["unfinished"] == []


def test_ops_alone_make_no_model(monkeypatch: Any, tmp_path: Path):
    monkeypatch.setattr(suite_context, "Bed", lambda *_, **options: pytest.fail("a model was made"))
    monkeypatch.setattr(suite_run, "RUN", {"ops": lambda context: {}})
    assert run(tmp_path, "ops") == 0
    figures = result(tmp_path)
    assert figures["sections"] == {"ops": {}} and figures["sizes"].items() >= SIZES.items()


def test_an_update_without_naive_says_what_it_leaves_out(monkeypatch: Any, tmp_path: Path):
    real = TrainerArm.figures

    def figures(self: TrainerArm, groups: Any) -> dict[str, float]:
        if self.arm.name == "naive":
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return real(self, groups)

    monkeypatch.setattr(TrainerArm, "figures", figures)
    peers_that_answer(monkeypatch, trl=ANSWERS, vlm=ANSWERS)
    assert run(tmp_path, "update", peers="trl,vlm") == 0
    found = result(tmp_path)
    assert found["sections"] == {} and found["complete"]
    without = dict.fromkeys(("repeated", "all", "trl", "vlm"), "its base naive was left out")
    expected = {"naive": "out of memory: tried to allocate 20 GiB", **without}
    assert found["skipped"] == {f"update/{name}": reason for name, reason in expected.items()}


def test_an_arm_that_memory_does_not_hold_is_left_out_with_those_that_need_it(monkeypatch: Any, tmp_path: Path):
    real = TrainerArm.step

    def step(self: TrainerArm) -> None:
        if self.arm.name in ("pack", "flat"):
            raise torch.OutOfMemoryError("tried to allocate 20 GiB\nmore")
        real(self)

    monkeypatch.setattr(TrainerArm, "step", step)
    few_arms(monkeypatch, "naive", "pack", "flat", "flat+skip_zero_advantage", "all")
    assert run(tmp_path, "step") == 0
    figures = result(tmp_path)
    assert figures["sections"]["step"]["arms"].keys() == {"naive", "all"}
    assert figures["skipped"]["step/pack"] == "out of memory: tried to allocate 20 GiB"
    assert figures["skipped"]["step/flat+skip_zero_advantage"] == "its base flat was left out"


def test_a_second_run_of_the_day_has_a_file_of_its_own(tmp_path: Path):
    for expected in ("tiny.json", "tiny-2.json", "tiny-3.json"):
        path = suite_run.new_file(tmp_path, "tiny")
        assert path.name.endswith(expected)
        path.touch()


def test_settings_that_cannot_be_are_one_line(capsys: Any):
    assert suite.main(["--only", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("refused: --only: 'nothing' is unknown")


def test_words_go_to_the_tools(monkeypatch: Any):
    for word, expected in (("compare", 3), ("report", 4), ("readme", 5)):
        name = {"report": "page"}.get(word, word)
        tool: Any = ModuleType(f"benchmarks.suite.{name}")
        tool.main = lambda words, expected=expected: expected if words == ["A", "--check"] else 9
        monkeypatch.setitem(sys.modules, f"benchmarks.suite.{name}", tool)
        monkeypatch.setattr(sys.modules["benchmarks.suite"], name, tool, raising=False)
        assert suite.main([word, "A", "--check"]) == expected
