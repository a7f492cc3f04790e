"""A file that is no result of the suite, or not of this layout, is refused with its name and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import RESULTS
from benchmarks.suite import page
from benchmarks.suite.reading import ResultError, read
from tests.benchmarks.suite_result import result, written

WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no commit": (lambda of: of.pop("commit"), "the file has no commit"),
    "another layout": (lambda of: of["figures"].update(suite=2), "layout 2 of the suite; this reads layout 1"),
    "no suite": (lambda of: of["figures"].pop("suite"), "not a result of the suite"),
    "no shape, no rounds": (lambda of: [of["figures"].pop(key) for key in ("shape", "rounds")], "has no shape, rounds"),
    "a section nobody knows": (
        lambda of: of["figures"]["sections"].update(extra={}),
        "sections/extra is not a section",
    ),
    "an arm without base": (lambda of: arms(of)["all"].pop("base"), "sections/step/all has no base"),
    "a base that is no arm": (lambda of: arms(of)["all"].update(base="none"), "the base 'none', which is no arm"),
    "no samples": (lambda of: arms(of)["all"].update(seconds=[]), "sections/step/all are not positive numbers"),
    "a NaN": (lambda of: arms(of)["all"].update(seconds=[1.0, float("nan"), 1.0]), "are not positive numbers"),
    "a round missing": (lambda of: arms(of)["all"].update(seconds=[1.0, 1.0]), r"\[2, 3\] samples; sample i"),
    "a cell without all": (
        lambda of: of["figures"]["sections"]["update"]["grid"][1]["seconds"].pop("all"),
        r"grid\[1\]/seconds has no all",
    ),
    "a memory arm without peak": (
        lambda of: of["figures"]["sections"]["memory"]["arms"]["all"].pop("peak_mib"),
        "sections/memory/all has no peak_mib",
    ),
}


def arms(of: dict[str, Any]) -> dict[str, Any]:
    return of["figures"]["sections"]["step"]["arms"]


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str):
    of = deepcopy(result())
    change(of)
    with pytest.raises(ResultError, match=rf"run\.json: .*{message}"):
        read(written(tmp_path, of))


TEXTS = {"not JSON": "{", "a list": "[1]", "no text": b"\xff\xfe"}


@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS.keys())
def test_what_is_no_result_is_named(tmp_path: Path, content: str | bytes):
    path = tmp_path / "other.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ResultError, match=r"other\.json: (not JSON|the file is not an object)"):
        read(path)


def test_a_result_of_another_benchmark_is_not_one_of_the_suite():
    with pytest.raises(ResultError, match=r"step\.json: not a result of the suite"):
        read(RESULTS / "step.json")


def test_what_was_written_is_read(tmp_path: Path):
    assert read(written(tmp_path, result())) == result() == json.loads(json.dumps(result()))


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: Any):
    assert page.main([str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'none.json'}: cannot be read: No such file or directory\n"
