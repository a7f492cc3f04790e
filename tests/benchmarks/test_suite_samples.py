"""Samples, energy, memory over time; and `vlmr1 bench`."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from statistics import median
from time import sleep
from typing import Any

import pytest
import torch

from benchmarks.suite.energy import Joules
from benchmarks.suite.progress import Progress
from benchmarks.suite.samples import Sample, in_turn, peak_mib, row, sample
from benchmarks.suite.timeline import NotedPhases, thinned, timeline
from tests.resident import resident
from vlmr1 import cli
from vlmr1.commands.bench import bench
from vlmr1.errors import UserError
from vlmr1.telemetry.nvml import GpuMeter

MIB = 2**20
ROOT = Path(__file__).parents[2]


def test_a_sample_has_time_peak_and_energy(monkeypatch: Any):
    readings = iter([100.0, 130.5])
    meter: Any = type("Meter", (), {})()
    meter.begin = lambda: setattr(meter, "first", next(readings))
    meter.end = lambda: {"gpu/energy_joules": next(readings) - meter.first}
    monkeypatch.setattr(GpuMeter, "of", lambda device: meter)
    found = sample(lambda: torch.ones(64 * MIB // 4).sum(), Joules("cpu"), lambda: {"rollout": 2.0})
    assert found.seconds > 0 and found.joules == 30.5 and found.phases == {"rollout": 2.0}
    assert (found.peak_mib is None) != torch.cuda.is_initialized()


def test_the_peak_of_a_call_is_what_was_alive_in_it():
    """Eight blocks of 16 MiB one after another, two alive at a time: without returning them it would be what is left
    of the heap. In a process whose heap nothing else has used; the middle one of seven, as the kernel may take cold
    pages away meanwhile, and bring them back."""
    work = "import torch\ndef work():\n block = torch.ones(4 * 2**20)\n for _ in range(7): block = block + 1\nwork()\n"
    code = work + "from benchmarks.suite.samples import peak_mib\nprint(*(peak_mib([], work) for _ in range(7)))"
    here = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels"))), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True, check=True)
    peaks = [float(peak) for peak in done.stdout.split()]
    assert len(peaks) == 7 and 30 < median(peaks) < 40, peaks


def test_a_peak_that_the_samples_have_is_theirs():
    assert peak_mib([Sample(1.0, 5.0), Sample(1.0, 7.0)], lambda: None) == 7.0


def test_there_is_no_energy_without_a_meter():
    assert Joules("cpu").around(lambda: 1.5) == (1.5, None)


def row_of(name: str, samples: Any) -> dict[str, Any]:
    return {"base": "a", "seconds": [each.seconds for each in samples]}


# Sample that is stopped, and what is left: rounds are a b c, c b a, a b c.
STOPPED = {
    "the first": (1, {}),
    "in the first round": (3, {"a": [1], "b": [2]}),
    "in the second": (6, {"a": [1], "b": [2], "c": [3]}),
    "in the third": (8, {"a": [1, 6], "b": [2, 5], "c": [3, 4]}),
    "never": (10, {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}),
}


@pytest.mark.parametrize(("stop", "left"), STOPPED.values(), ids=STOPPED.keys())
def test_rounds_that_are_stopped_leave_the_whole_ones(stop: int, left: dict[str, list[int]]):
    progress, counts = Progress(), iter(range(1, 10))

    def arm() -> Sample:
        if (number := next(counts)) == stop:
            raise KeyboardInterrupt
        return Sample(number)

    with suppress(KeyboardInterrupt):
        in_turn(dict.fromkeys("abc", arm), rounds=3, kept=progress.rounds(row_of))
    found = progress.so_far()
    assert {name: row["seconds"] for name, row in found.get("arms", {}).items()} == left
    assert found.keys() == ({"arms"} if left else set())


def test_what_was_done_stays_as_it_is():
    progress = Progress()
    in_turn({"a": lambda: Sample(1.0), "b": lambda: Sample(2.0)}, rounds=2, kept=progress.rounds(row_of))
    progress.arms["a"] = row_of("a", [Sample(1.0)] * 2) | {"peak_mib": 5.0}
    progress.section["grid"] = []
    assert progress.so_far()["arms"]["a"]["peak_mib"] == 5.0
    assert progress.so_far()["arms"]["b"] == {"base": "a", "seconds": [2.0, 2.0]}
    del progress.arms["a"]
    progress.rounds(lambda name, samples: None if name == "a" else row_of(name, samples))
    assert progress.so_far() == {}  # the base of b has no row


def test_cases_of_ops_have_no_arms():
    progress = Progress()
    assert progress.so_far() == {}
    progress.section["grpo_loss 8x4"] = {"arms": {}}
    assert progress.so_far() == {"grpo_loss 8x4": {"arms": {}}}


def test_row():
    phases = [{"rollout": 1.0, "old": 0.1, "update": 3.0}, {"rollout": 2.0, "update": 3.0}]
    samples = [Sample(4.0, None, 50.0, phases[0]), Sample(5.0, None, 60.0, phases[1])]
    given = {"label": "a", "base": "naive", "tokens": 64, "settings": {"pack": True}}
    assert row(samples, **given, utilization=0.5, peak_mib=12.0, check=None) == {
        **given,
        "group": "ablation",
        "seconds": [4.0, 5.0],
        "phases": {"rollout": [1.0, 2.0], "update": [3.0, 3.0]},
        "peak_mib": 12.0,
        "energy_joules": [50.0, 60.0],
        "utilization": 0.5,
        "note": "",
    }
    assert row([Sample(1.0)], **given).keys() == {*given, "group", "seconds", "note"}


def highest(points: Any) -> Any:
    return max(points, key=lambda point: point[1])


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="watches the resident set")
def test_a_timeline_sees_what_came_and_went_in_its_phase():
    phases = NotedPhases()

    def work() -> None:
        sleep(0.1)
        with phases("backward"), resident(64):
            sleep(0.2)
        sleep(0.1)

    # The highest of three: the kernel may take cold pages away meanwhile.
    before, points = max((timeline(work, lambda: phases.now) for _ in range(3)), key=lambda found: highest(found[1])[1])
    assert before > 10
    seconds, mib, phase = highest(points)
    assert 60 < mib < 80 and phase == "backward" and seconds > 0.1
    assert points == sorted(points) and points[0][2] == points[-1][2] == ""


def test_thinning_keeps_every_peak():
    points = [(float(i), 50.0 if i == 33 else 1.0, "forward") for i in range(100)]
    left = thinned(points, most=10)
    assert len(left) == 10 and (33.0, 50.0, "forward") in left
    assert thinned(points, most=100) == points and thinned([]) == []


def test_bench_runs_the_suite_of_the_checkout_where_the_caller_is(tmp_path: Path, monkeypatch: Any):
    suite = tmp_path / "root" / "benchmarks" / "suite"
    suite.mkdir(parents=True)
    for package in (suite.parent, suite):
        (package / "__init__.py").touch()
    (suite / "__main__.py").write_text(
        "import sys, pathlib\npathlib.Path('words').write_text(' '.join(sys.argv[1:]))\nsys.exit(7)\n"
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = "from pathlib import Path; from vlmr1.commands.bench import bench; bench({}, root=Path({!r}))"
    words = run.format(["compare", "A", "--fail-over", "5"], str(tmp_path / "root"))
    here = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    assert subprocess.run([sys.executable, "-c", words], env=here, check=False).returncode == 7
    assert Path("words").read_text() == "compare A --fail-over 5"


def test_bench_without_the_checkout_is_one_message(tmp_path: Path):
    with pytest.raises(UserError, match="bench needs a checkout of vlmr1"):
        bench([], root=tmp_path)


def test_the_command_passes_its_words_on(monkeypatch: Any):
    called = []
    monkeypatch.setattr("vlmr1.commands.bench.bench", called.append)
    cli.main(["bench", "--only", "ops", "--quick", "-h"])
    assert called == [["--only", "ops", "--quick", "-h"]]
