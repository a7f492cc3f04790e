"""The step benchmark: its arms, what is left out and why, what a stopped run keeps; and real arms that agree."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import report, step, step_session
from benchmarks.arms import NAIVE, REFERENCES, arms_of, settings_of
from benchmarks.harness import require_equal
from benchmarks.model import SHAPES
from benchmarks.planned import beyond_held, peak_bytes, planned_phases
from benchmarks.trainer_arm import Bed, TrainerArm
from tests.helpers.small_bench import SMALL
from vlmr1_kernels import registry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="expects a CPU's arms")
CHOSEN = {each.op: each.chosen for each in registry.explain_all("cpu", torch.float32)}
GIB = 2**30
REAL = ("test_all_arms_agree_and_make_steps", "test_the_plan_counts_the_dense_masks_of_reference_attention")


class FakeArm:
    """An arm whose figures, samples and memory are given."""

    different, fails, stops_at = "", "", 10**9
    calls: list[str]

    def __init__(self, name: str, bed: Any, settings: Any, *, flat: bool = False, rollout: bool = False):
        self.name, self.logs = name, {}

    def first(self, clock: Any) -> tuple[float, float]:
        self.step()
        return 1.0, 5.0

    def seconds(self, clock: Any) -> float:
        return clock(self.step)

    def figures(self) -> dict[str, float]:
        return {"loss": 1.0, "grad_norm": 2.001 if self.name == self.different else 2.0}

    def step(self) -> None:
        self.calls.append(self.name)
        if len(self.calls) == self.stops_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.name == self.fails:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB\nmore")

    def phases(self) -> dict[str, float]:
        return {"rollout": 0.25}

    def memory_by_phase(self) -> dict[str, float]:
        return {"rollout": 3.0, "forward": 7.0}


def fake_bed(folder: Path, shape: Any, device: str, dtype: str) -> Any:
    group = SimpleNamespace(prompt=SimpleNamespace(input_ids=range(20 + shape.image_tokens)))
    return SimpleNamespace(groups=[group], model=torch.nn.Linear(2, 3))


@pytest.fixture(autouse=True)
def fakes(request: Any, monkeypatch: Any) -> Any:
    """Arms that take no time, plans that are known, and a clock that counts seconds."""
    if request.node.name in REAL:
        yield None
        return
    plans: dict[str, float] = {}  # GiB by the settings' value that stands out

    def planned(settings: Any, *_: Any) -> dict[str, dict[str, int]]:
        gib = plans.get(next((key for key in plans if settings.get(key) is True), ""), 1.0)
        return {"rollout": {"weights": 2**20, "kv cache": 2**20}, "policy": {"activations": round(gib * GIB)}}

    fake = type("Fake", (FakeArm,), {"calls": []})
    seconds = iter(range(1, 10_000))
    monkeypatch.setattr(step_session, "TrainerArm", fake)
    monkeypatch.setattr(step_session, "Bed", fake_bed)
    monkeypatch.setattr(step_session, "planned_phases", planned)
    monkeypatch.setattr(step_session, "clock_of", lambda device: lambda function: (function(), float(next(seconds)))[1])
    yield SimpleNamespace(arm=fake, plans=plans)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(out: Path, *words: str, peers: str = "none") -> int:
    given = ["--shape", "tiny", "--rounds", "2", "--threads", "1", "--peers", *peers.split(), "--out", str(out)]
    return command.main([*given, *words])


def test_a_run_keeps_every_sample_and_says_what_runs(tmp_path: Path, capsys: Any):
    out = tmp_path / "run.json"
    assert run(out, "--memory", "--arms", "all", "native") == 0
    result = report.read(out)
    assert result["complete"] and result["skipped"] == {} and result["rounds"] == 2
    arms = result["arms"]
    assert arms.keys() == {"naive", "native", "all"}  # the base comes with them
    # the clock counts: naive, native, all, then all, native, naive
    assert {name: arm["seconds"] for name, arm in arms.items()} == {"naive": [1, 6], "native": [2, 5], "all": [3, 4]}
    assert arms["all"]["phases"] == {"rollout": [0.25, 0.25]} and arms["all"]["memory_by_phase"]["forward"] == 7.0
    assert arms["all"]["check"] == {"loss": 1.0, "grad_norm": 2.0} and arms["all"]["base"] == "naive"
    assert arms["all"]["planned_gib"] == 1.0 and arms["all"]["planned_mib"] == {"rollout": 1.0, "policy": 1024.0}
    assert result["tree_peak_mib"] > 10 and "peak of the process tree" in (said := capsys.readouterr().out)
    assert "planning native" in said and "round 2 of 2: all; about" in said
    assert (tmp_path / "run.html").exists() and "| rollout_engine=native alone " in said


def test_the_long_shape_has_the_model_of_bench_and_longer_completions(tmp_path: Path):
    words = ["--rounds", "1", "--threads", "1", "--peers", "none", "--arms", "all", "--out", str(tmp_path / "run.json")]
    assert command.main(["--shape", "long", *words]) == 0
    sizes, bench = report.read(tmp_path / "run.json")["sizes"], SHAPES["bench"]
    assert sizes["completion_tokens"] == 512 == 8 * bench.completion_length and sizes["prompts"] == bench.prompts
    assert sizes["image_tokens"] == bench.image_tokens and SHAPES["long"].text is bench.text


@pytest.mark.slow
def test_an_arm_planned_above_the_limit_is_left_out_with_those_that_need_it(fakes: Any, tmp_path: Path, capsys: Any):
    fakes.plans |= {"freeze_vision": 21.0}
    assert run(tmp_path / "run.json") == 0
    result = report.read(tmp_path / "run.json")
    assert result["skipped"]["frozen"] == "planned at 21.0 GiB, the limit is 20 GiB"
    assert "frozen is left out: planned at 21.0 GiB" in capsys.readouterr().out
    assert result["skipped"]["cuda_graphs"] == "needs a GPU" and "frozen" not in fakes.arm.calls
    names = {"naive", "share_vision", "share_prompt", "pack", "native", "grpo_loss", "shared", "flat", "all"}
    assert names <= result["arms"].keys()
    assert run(tmp_path / "more.json", "--limit", "22", "--arms", "frozen") == 0
    assert report.read(tmp_path / "more.json")["arms"].keys() == {"frozen"}


def test_arms_that_disagree_are_refused_before_anything_is_timed(fakes: Any, tmp_path: Path, capsys: Any):
    fakes.arm.different = "all"
    assert run(tmp_path / "run.json") == 1
    assert "refused: grad_norm is 2.001 in all and 2.0 in naive" in capsys.readouterr().err
    assert fakes.arm.calls == [] and not (tmp_path / "run.json").exists()


@pytest.mark.slow
def test_an_arm_that_memory_does_not_hold_is_left_out(fakes: Any, tmp_path: Path):
    fakes.arm.fails = "flat"
    assert run(tmp_path / "run.json") == 0
    result = report.read(tmp_path / "run.json")
    assert result["skipped"]["flat"] == "out of memory: tried to allocate 20 GiB"
    assert result["skipped"]["flat+skip_zero_advantage"] == "its base flat was left out"


# Each arm makes a first step; then naive, all, all, naive.
@pytest.mark.parametrize(("call", "samples"), [(6, {"naive": 1, "all": 1}), (4, {"naive": 1}), (1, {})])
@pytest.mark.slow
def test_a_run_that_is_stopped_keeps_whole_rounds(call: int, samples: Any, fakes: Any, tmp_path: Path):
    fakes.arm.stops_at = call
    assert run(tmp_path / "run.json", "--arms", "all") == 130
    assert (tmp_path / "run.json").exists() == bool(samples)
    result = report.read(tmp_path / "run.json") if samples else {"complete": False, "arms": {}}
    assert not result["complete"]
    assert {name: len(arm["seconds"]) for name, arm in result["arms"].items()} == samples


@pytest.mark.slow
def test_rollouts_and_the_grid(fakes: Any, tmp_path: Path):
    assert run(tmp_path / "rollout.json", "--rollout") == 0
    result = report.read(tmp_path / "rollout.json")
    assert result["rollout"] and result["arms"].keys() == {"naive", "native", "all"}
    assert run(tmp_path / "grid.json", "--grid", "--arms", "naive") == 0
    cells = report.read(tmp_path / "grid.json")["grid"]
    assert [(cell["num_generations"], cell["prompt_tokens"]) for cell in cells] == [(2, 24), (2, 36), (4, 24), (4, 36)]
    assert all(map(len, (cell["seconds"]["naive"] + cell["seconds"]["all"] for cell in cells)))


ANSWERS = {
    "figures": {"loss": 1.0, "grad_norm": 2.0},
    "seconds": 0.5,
    "peak_mib": 7.5,
    "settings": {"attention": "sdpa"},
}
PROGRAM = "import sys, json\nfor line in sys.stdin: print(json.dumps({!r}[line.strip()]), flush=True)"


@pytest.mark.slow
def test_peers_alternate_with_our_arms_and_one_that_fails_or_disagrees_is_left_out(monkeypatch: Any, tmp_path: Path):
    programs = {
        "trl": PROGRAM.format(ANSWERS),
        "vlm-r1": PROGRAM.format(ANSWERS | {"figures": {"loss": 1.5, "grad_norm": 2.0}}),
        # it ends at its third sample
        "other": "left = iter((1, 2))\n"
        + PROGRAM.format(ANSWERS).replace("print", "line == 'seconds\\n' and next(left); print"),
    }
    monkeypatch.setattr(step_session, "command", lambda name, **_: [sys.executable, "-c", programs[name]])
    known = {name: SimpleNamespace(label=name, note="", why_not=lambda: None) for name in programs}
    for module in (step, step_session):
        monkeypatch.setattr(module, "PEERS", known)
    assert run(tmp_path / "run.json", "--arms", "all", peers="trl vlm-r1 other") == 0
    result = report.read(tmp_path / "run.json")
    trl = result["arms"]["trl"]
    assert (trl["seconds"], trl["peak_mib"], trl["group"], trl["base"]) == ([0.5, 0.5], 7.5, "peer", "naive")
    assert result["arms"].keys() == {"naive", "all", "trl"}
    assert all(len(arm["seconds"]) == 2 for arm in result["arms"].values())
    assert "loss is 1.5 in vlm-r1" in result["skipped"]["vlm-r1"]
    assert result["skipped"]["other"].startswith("its process ended with status 1: StopIteration")


REFUSED = {
    "unknown arm": (["--arms", "nothing"], "--arms: nothing"),
    "an arm of a GPU": (["--arms", "cuda_graphs"], "--arms: cuda_graphs: needs a GPU"),
    "no rounds": (["--rounds", "-1"], "--rounds is -1"),
    "peers of rollouts": (["--rollout", "--peers", "trl"], "--peers has no effect with --rollout"),
    "unknown peer": (["--peers", "verl"], "--peers: verl: unknown"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_that_cannot_be_are_one_line(words: list[str], message: str, tmp_path: Path, capsys: Any):
    assert command.main(["--shape", "tiny", "--out", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_default_has_naive_every_switch_everything_and_trl():
    options = step.parse([])
    assert (options.shape, options.peers, options.limit, options.arms) == ("bench", ["trl"], 20.0, None)
    made, left_out = arms_of("cpu", CHOSEN)
    settings = {name: settings_of(made, name) for name in made}
    for switch in ("share_vision", "share_prompt", "pack", "freeze_vision", "skip_zero_advantage"):
        assert any(of.get(switch) is True and not NAIVE.get(switch) for of in settings.values()), switch
    for op, chosen in CHOSEN.items():
        names = [name for name in (*made, *left_out) if name == op or name.endswith(f"+{op}")]
        assert names and all(name in left_out or f"{op}={chosen}" in settings[name]["kernels"] for name in names)
    references = ",".join(f"{op}={name}" for op, name in REFERENCES.items())
    assert settings["naive"] == {**NAIVE, "kernels": references} and settings["shared"]["kernels"] == references
    assert settings_of(arms_of("cuda", CHOSEN)[0], "all")["cuda_graphs"]


@pytest.mark.slow
def test_all_arms_agree_and_make_steps(tmp_path: Path):
    made, _ = arms_of("cpu", CHOSEN)
    bed = Bed(tmp_path, SMALL, "cpu", "float32")
    arms = {name: TrainerArm(name, bed, settings_of(made, name), flat=arm.flat) for name, arm in made.items()}
    figures = {name: arm.figures() for name, arm in arms.items()}
    assert figures["frozen"]["grad_norm"] < figures["naive"]["grad_norm"] != figures["flat"]["grad_norm"]
    for name, arm in made.items():
        require_equal({arm.base: figures[arm.base], name: figures[name]}, 1e-4)
    weights = bed.model.lm_head.weight.detach().clone()
    for arm in arms.values():
        arm.step()
        assert {"rollout", "forward", "backward", "update"} <= arm.phases().keys()
        assert not torch.equal(weights, bed.model.lm_head.weight)
    assert {"rollout", "forward", "backward"} <= arms["all"].memory_by_phase().keys()


@pytest.mark.slow
def test_the_plan_counts_the_dense_masks_of_reference_attention():
    shape = replace(SMALL, completion_length=64)
    settings = {**NAIVE, "pack": True, "share_vision": True, "share_prompt": True, "rollout_engine": "native"}
    dense = planned_phases({**settings, "kernels": "shared_prefix_attention=reference"}, shape, 20, "cpu")
    fast = planned_phases({**settings, "kernels": "shared_prefix_attention=cpu"}, shape, 20, "cpu")
    rows = shape.prompts * (20 + shape.num_generations * shape.completion_length)
    scores = 4 * shape.text["num_attention_heads"] * rows**2  # float32 scores of one layer
    assert beyond_held(dense)["policy"] - beyond_held(fast)["policy"] >= scores
    assert beyond_held(dense)["policy"] < peak_bytes(dense)
