"""The harness's arithmetic, its result file, and that it refuses to time arms that disagree."""

from __future__ import annotations

import itertools
import json
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import (
    CheckFailed,
    PeakMemory,
    alternate,
    commit,
    ratio,
    require_equal,
    table,
    timed,
    versions,
    write_result,
)
from tests.resident import resident


def test_arms_are_called_in_turn_and_warmup_is_not_counted():
    calls: list[str] = []
    counts = {"a": itertools.count(1), "b": itertools.count(10)}

    def arm(name: str) -> float:
        calls.append(name)
        return float(next(counts[name]))

    seconds = alternate({"a": lambda: arm("a"), "b": lambda: arm("b")}, rounds=3, warmup=2)
    assert seconds == {"a": [3.0, 4.0, 5.0], "b": [12.0, 13.0, 14.0]}
    assert "".join(calls) == "abbaabbaab"


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds is 0"):
        alternate({}, rounds=0)


def test_ratio_is_of_medians_and_its_spread_of_single_rounds():
    result = ratio({"slow": [6.0, 100.0, 8.0], "fast": [2.0, 4.0, 2.0]}, "slow", "fast")
    assert (result.value, result.low, result.high) == (4.0, 3.0, 25.0)
    assert str(result) == "4.00 (3.00..25.00)"


def test_timed_counts_the_function():
    assert 0 < timed(lambda: sum(range(1000)))() < 5


AGREEMENT = {
    "equal": ({"loss": 1.0}, None),
    "within": ({"loss": 1.00009}, None),
    "beyond": ({"loss": 1.0002}, "loss is 1.0002 in b and 1.0 in a"),
    "nan": ({"loss": float("nan")}, "loss is nan in b"),
    "another_figure": ({"norm": 1.0}, "b reports"),
}


@pytest.mark.parametrize(("other", "message"), AGREEMENT.values(), ids=AGREEMENT.keys())
def test_arms_must_agree(other: dict[str, float], message: str | None):
    if message is None:
        require_equal({"a": {"loss": 1.0}, "b": other})
        return
    with pytest.raises(CheckFailed, match=message):
        require_equal({"a": {"loss": 1.0}, "b": other})


def test_result_file_has_machine_versions_commit_command_and_date(tmp_path: Path):
    figures = {"median_ms": {"a": 2.5}, "time a/b": ratio({"a": [6.0], "b": [2.0]}, "a", "b")}
    result = json.loads(write_result(tmp_path / "deep" / "result.json", figures).read_text())
    assert result["figures"] == {
        "median_ms": {"a": 2.5},
        "time a/b": {"value": 3.0, "low": 3.0, "high": 3.0},
    }
    assert result["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert result.keys() == {"machine", "versions", "commit", "command", "date", "figures"}
    assert all(result.values())


def test_a_result_that_cannot_be_written_whole_leaves_the_one_before(tmp_path: Path, monkeypatch: Any):
    path = write_result(tmp_path / "result.json", {"a": 1})
    before = path.read_text()
    write = Path.write_text

    def half(self: Path, text: str, **options: Any) -> int:
        write(self, text[: len(text) // 2], **options)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space left"):
        write_result(path, {"a": 2})
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a module and a result, committed."""

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    (tmp_path / "code").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "code" / "module.py").write_text("a = 1\n")
    (tmp_path / "results" / "old.json").write_text("{}\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    return tmp_path


DIRTY = {  # files that are written, and whether the code is no longer that of the commit
    "nothing": ([], False),
    "the result": (["results/new.json"], False),
    "its report and another result": (["results/new.json", "results/new.md", "results/deep/other.json"], False),
    "an untracked module": (["results/new.json", "code/other.py"], True),
    "a changed module": (["results/new.json", "code/module.py"], True),
    "another result changed": (["results/new.json", "results/old.json"], True),
}


@pytest.mark.parametrize(("files", "dirty"), DIRTY.values(), ids=DIRTY.keys())
def test_what_a_run_writes_is_no_change_of_the_code(repository: Path, files: list[str], dirty: bool):
    for name in files:
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("new\n")
    found = commit(repository / "results" / "new.json", repository / "code")
    assert len(found.rstrip("+")) >= 7 and found.endswith("+") == dirty


def test_a_result_that_is_written_again_is_no_change_of_the_code(repository: Path):
    (repository / "results" / "old.json").write_text("new\n")
    assert not commit(repository / "results" / "old.json", repository / "code").endswith("+")
    assert commit(repository / "results" / "other.json", repository / "code").endswith("+")
    assert commit(None, repository / "code").endswith("+")


def test_beside_a_result_in_the_root_other_files_count(repository: Path):
    (repository / "new.json").write_text("{}\n")
    assert not commit(repository / "new.json", repository / "code").endswith("+")
    (repository / "code" / "other.py").write_text("b = 1\n")
    assert commit(repository / "new.json", repository / "code").endswith("+")
    assert commit(None, repository.parent) == "unknown"


def test_versions_leave_out_what_is_absent(monkeypatch: Any):
    found = [SimpleNamespace(name="Cut_Cross_Entropy", version="1.2"), SimpleNamespace(name="torch", version="3")]
    monkeypatch.setattr(harness.metadata, "distributions", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert versions().items() - {("python", platform.python_version())} == {
        ("torch", "3"),
        ("cut-cross-entropy", "1.2"),
    }


def test_table_is_markdown():
    assert table(["arm", "ms"], [["floor", "1.5"]]) == "| arm   |  ms |\n| :---- | --: |\n| floor | 1.5 |"


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="measures the resident set")
def test_peak_memory_sees_what_came_and_went():
    peak = PeakMemory()
    with resident(64):
        pass
    if peak.reset:
        assert 60 < peak.mib() < 120
    else:
        assert 0 <= peak.mib() < 120
