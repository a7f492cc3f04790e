"""benchmarks/gpu.py: parts with limits of their own, results as they come; every part on a CPU at tiny size."""

import json
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from benchmarks import gpu, gpu_training
from benchmarks.ops import cases
from tests.helpers.small_bench import gone

WRITE = 'import pathlib; pathlib.Path({!r}).write_text(\'{{"found": 7}}\\n{{"half\')'


def run(monkeypatch: Any, out: Path, programs: dict[str, str], seconds: str = "300", **limits: float) -> int:
    monkeypatch.setattr(gpu, "LIMITS", dict.fromkeys(programs, 60.0) | limits)
    monkeypatch.setattr(gpu, "command", lambda name, options: [sys.executable, "-c", programs[name]])
    return gpu.main(["--device", "cuda", "--out", str(out), "--seconds", seconds])


def test_every_part_runs_although_one_fails_and_results_are_in_the_table(monkeypatch: Any, tmp_path: Path, capsys: Any):
    programs = {
        "first": WRITE.format(str(tmp_path / "gpu-first.jsonl")) + "; raise SystemExit(3)",
        "second": "print('last words')",
    }
    assert run(monkeypatch, tmp_path, programs) == 1
    table = capsys.readouterr().out.rsplit("\n\n", 1)[1].splitlines()
    assert table[0].startswith("first: failed (3)") and table[1] == "    found: 7" and table[2].startswith("second: ok")
    assert "last words" in (tmp_path / "gpu.log").read_text()
    assert run(monkeypatch, tmp_path, {"second": ""}) == 0


def test_a_part_is_killed_at_its_limit_with_what_it_started(monkeypatch: Any, tmp_path: Path, capsys: Any):
    pids = tmp_path / "pids"

    class Started(subprocess.Popen):
        """Its limit begins when it has started a process: how long that takes depends on the machine."""

        def communicate(self, *arguments: Any, **named: Any) -> Any:
            end = monotonic() + 300
            while self.poll() is None and not (pids.exists() and pids.read_text()):
                assert monotonic() < end, "no process was started"
                sleep(0.01)
            return super().communicate(*arguments, **named)

    monkeypatch.setattr(subprocess, "Popen", Started)
    child = (
        f'import subprocess, time; p = subprocess.Popen(["sleep", "600"]); open({str(pids)!r}, "w").write(str(p.pid))'
    )
    assert run(monkeypatch, tmp_path, {"hangs": child + "; time.sleep(600)", "next": ""}, hangs=1.1) == 1
    said = capsys.readouterr().out
    assert "hangs: stopped after 1 s" in said and "next: ok" in said
    assert gone(int(pids.read_text()))


def test_parts_that_no_time_is_left_for_are_skipped(monkeypatch: Any, tmp_path: Path, capsys: Any):
    assert run(monkeypatch, tmp_path, {"first": "import time; time.sleep(0.4)", "second": ""}, seconds="1.3") == 1
    assert "second: skipped: no time left" in capsys.readouterr().out


def test_results_are_written_at_once_and_have_a_bound(monkeypatch: Any, tmp_path: Path):
    monkeypatch.setattr(gpu, "RESULT_BYTES", 40)
    results = gpu.results_in(tmp_path / "gpu-ops.jsonl")
    for value in range(9):
        results("name", value)
        assert json.loads((tmp_path / "gpu-ops.jsonl").read_text().splitlines()[0]) == {"name": 0}
    assert (tmp_path / "gpu-ops.jsonl").stat().st_size <= 40


def test_the_defaults_keep_to_what_the_machine_takes():
    options, parts = gpu.parse([]), len(gpu.LIMITS)
    assert options.seconds == 300 and options.parts == list(gpu.LIMITS) == list(gpu_training.PARTS)
    assert parts + 1 <= 8 and parts * (gpu.RESULT_BYTES + gpu.LOG_BYTES) <= 2**24


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_at_tiny_size(tmp_path: Path, capsys: Any):
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name}: ok" in said for name in gpu.LIMITS)
    found = {}
    for name in gpu.LIMITS:
        lines = (tmp_path / f"gpu-{name}.jsonl").read_text().splitlines()
        found[name] = {key: value for line in lines for key, value in json.loads(line).items()}
    assert found["imports"]["versions"].keys() >= {"python", "torch", "transformers"}
    assert found["imports"]["auto torch.float32"].keys() == found["imports"]["auto torch.bfloat16"].keys()
    for case in cases("tiny"):
        measured = found["ops" if case.op.startswith("linear") else "attention"]
        assert len(measured[f"{case} floor"]["seconds"]) == len(measured[f"{case} reference"]["seconds"]) == 3
    assert found["ops"]["linear_grpo_loss (128, 64, 512), chunks of 128, ms"] > 0
    for name in ("step3b", "cap7b"):
        logs = [found[name][f"update {step}"] for step in (1, 2, 3)]
        assert all(log["grad_norm"] > 0 and log["seconds/rollout"] > 0 for log in logs)
        assert found[name]["planned MiB by phase"].keys() == {"rollout", "reference", "policy", "update"}
    assert found["step3b"]["decode 1 groups x 4, graphs False"]["ms a decode step"] > 0
    (tests,) = found["tests"].values()
    assert " passed" in tests["summary"] and tests["bad"] == []


def test_what_fails_is_noted_and_the_next_measurement_runs():
    notes: dict[str, Any] = {}
    note = gpu_training.Note(notes.__setitem__)
    with note.attempt("first"):
        raise RuntimeError("CUDA error: no kernel image\nmore")
    with note.attempt("second"):
        note("second", 1)
    assert note.failed == ["first"]
    assert notes == {"first FAILED": "RuntimeError: CUDA error: no kernel image", "second": 1}
    with pytest.raises(KeyboardInterrupt), note.attempt("third"):
        raise KeyboardInterrupt
