"""Alternation with a clock that is given, agreement of arms, peak memory from given files, result files."""

import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.harness import (
    CheckFailed,
    PeakMemory,
    alternate,
    commit,
    cpu_clock,
    read_result,
    require_equal,
    write_result,
)
from benchmarks.process_tree import TreePeak, tree_mib
from vlmr1.errors import UserError


def test_arms_alternate_every_second_round_in_reverse_and_every_sample_is_kept():
    ticks, told = iter(range(1, 20)), []
    arms = {name: lambda: float(next(ticks)) for name in "abc"}
    samples = alternate(arms, rounds=3, before=lambda name, number: told.append((number, name)))
    assert samples == {"a": [1.0, 6.0, 7.0], "b": [2.0, 5.0, 8.0], "c": [3.0, 4.0, 9.0]}
    assert told == [(1, name) for name in "abc"] + [(2, name) for name in "cba"] + [(3, name) for name in "abc"]


def test_a_cpu_sample_calls_the_function_once():
    calls: list[int] = []
    assert cpu_clock(lambda: calls.append(1)) >= 0 and calls == [1]


@pytest.mark.parametrize("other", [{"loss": 1.0002}, {"loss": float("nan")}, {"norm": 1.0}], ids=str)
def test_arms_must_agree(other: dict[str, float]):
    require_equal({"a": {"loss": 1.0}, "b": {"loss": 1.00009}}, 1e-4)
    with pytest.raises(CheckFailed, match=r"loss is .* in b|b reports"):
        require_equal({"a": {"loss": 1.0}, "b": other}, 1e-4)


def test_a_floor_allows_a_loss_near_zero():
    given = {"a": {"loss": 1e-6}, "b": {"loss": 3e-6}}
    require_equal(given, 1e-4, loss=5e-6)
    with pytest.raises(CheckFailed, match="loss"):
        require_equal(given, 1e-4, loss=1e-6)


def process(folder: Path, pid: int, parent: int, kib: int | None) -> Path:
    (folder / str(pid)).mkdir()
    memory = [] if kib is None else [f"VmHWM:\t{kib + 1024} kB", f"VmRSS:\t{kib} kB"]
    status = folder / str(pid) / "status"
    status.write_text("\n".join(["Name:\tpython", f"PPid:\t{parent}", *memory]) + "\n")
    return status


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="reads what torch allocated")
def test_peak_memory_is_the_high_water_mark_above_the_resident_set(tmp_path: Path):
    status = process(tmp_path, 7, 1, 10 * 1024)
    peak = PeakMemory(status)
    assert (status.parent / "clear_refs").read_text() == "5" and peak.mib() == 1.0
    status.write_text("VmHWM:\t30720 kB\nVmRSS:\t1024 kB\n")
    assert peak.mib() == 20.0
    assert PeakMemory(tmp_path / "nowhere" / "status").mib() is None


def test_memory_of_a_process_tree_leaves_strangers_and_zombies_out(tmp_path: Path):
    for pid, parent, kib in ((10, 1, 1024), (11, 10, 2048), (12, 11, 4096), (13, 10, None), (20, 1, 8192)):
        process(tmp_path, pid, parent, kib)
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")
    (tmp_path / "99").mkdir()  # has ended between the listing and the reading
    assert tree_mib(10, tmp_path) == 7.0 and tree_mib(20, tmp_path) == 8.0


def test_the_peak_of_a_tree_is_the_highest_sample(tmp_path: Path):
    process(tmp_path, 10, 1, 9 * 1024)
    with TreePeak(10, tmp_path, interval=600) as peak:
        peak.sample()
        process(tmp_path, 11, 10, 2 * 1024)
        peak.sample()
        (tmp_path / "11" / "status").unlink()
    assert peak.mib == 11.0


def test_a_result_comes_back_as_it_was_with_what_tells_its_origin(tmp_path: Path):
    path = write_result(tmp_path / "deep" / "result.json", "step", {"arms": {"a": {"seconds": [2.5, 3.5]}}})
    result = read_result(path, "step")
    assert result["arms"] == {"a": {"seconds": [2.5, 3.5]}}
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(result[name] for name in ("machine", "versions", "commit", "command", "date", "layout"))


FAULTS = {
    "absent": (None, "cannot be read"),
    "no JSON": ("{", "cannot be read"),
    "another kind": ('{"kind": "ops", "layout": 2}', "kind step"),
    "another layout": ('{"kind": "step", "layout": 1}', "layout 2"),
}


@pytest.mark.parametrize(("content", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_file_that_is_no_result_is_named(content: str | None, message: str, tmp_path: Path):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"result.json.*{message}"):
        read_result(path, "step")


def test_a_commit_is_marked_where_the_code_differs_from_it(tmp_path: Path):
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "module.py").write_text("a = 1\n")
    (results / "old.json").write_text("{}\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    (results / "old.json").write_text("new\n")
    (results / "new.json").write_text("new\n")
    clean = commit(tmp_path / "benchmarks")
    assert len(clean) >= 7 and not clean.endswith("+")
    (tmp_path / "module.py").write_text("a = 2\n")
    assert commit(tmp_path / "benchmarks") == clean + "+"
    assert commit(tmp_path.parent) == "unknown"
