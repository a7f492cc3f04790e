"""Planted changes are found and called by their size, runs without one are not, and machines are not mixed up."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.suite import compare
from benchmarks.suite.noise import LEVEL, Change, p_value
from benchmarks.suite.reading import TIMED, ResultError
from tests.benchmarks.suite_result import result, written


def test_p_by_hand():
    # 5 and 5 samples: 252 orders, of which one is the most uneven on each side
    assert p_value([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    # 4 of 252 have a rank sum of at most 17: {1,2,3,4,5} 15, {1,2,3,4,6} 16, {1,2,3,4,7} and {1,2,3,5,6} 17
    assert p_value([1, 2, 3, 4, 7], [5, 6, 8, 9, 10]) == pytest.approx(8 / 252)
    assert p_value([1, 2, 3, 4], [5, 6, 7, 8, 9]) is None  # 2 / 126 is above the level
    assert p_value([1.0] * 6, [1.0] * 6) == 1


def test_marks_of_a_change():
    assert str(Change(2.0, 2.2, 0.004)) == "+10.0% *"
    assert str(Change(2.0, 1.9, 0.4)) == "-5.0%"
    assert str(Change(2.0, 1.9, None)) == "-5.0% ?"


def share_moved(factor: float, *, rounds: int, slow: float, pairs: int = 400) -> float:
    """Of pairs of runs with 3 % of spread, where a share of the rounds takes 30 % longer."""
    random = np.random.default_rng(0)

    def samples(median: float) -> list[float]:
        return (median * random.lognormal(0, 0.03, rounds) * np.where(random.random(rounds) < slow, 1.3, 1.0)).tolist()

    return sum(Change(1.0, factor, p_value(samples(1.0), samples(factor))).moved for _ in range(pairs)) / pairs


@pytest.mark.parametrize("rounds", (5, 7, 20))
@pytest.mark.parametrize("slow", (0.0, 0.1), ids=("quiet", "busy"))
def test_runs_of_one_distribution_rarely_differ(rounds: int, slow: float):
    assert share_moved(1.0, rounds=rounds, slow=slow) <= 2 * LEVEL


PLANTED = {"quiet": (7, 0.0), "busy": (20, 0.1)}


@pytest.mark.parametrize(("rounds", "slow"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_change_is_found(rounds: int, slow: float):
    assert share_moved(1.1, rounds=rounds, slow=slow) >= 0.95
    assert share_moved(0.9, rounds=rounds, slow=slow) >= 0.95


def run(seed: int = 0, rounds: int = 7, **factors: float) -> dict[str, Any]:
    """The fixture with `rounds` samples an arm; `factors`: how much longer an arm takes."""
    of, random = result(), np.random.default_rng(seed)
    for section in (of["figures"]["sections"][name] for name in TIMED):
        for name, arm in section["arms"].items():
            middle = factors.get(name, 1.0) * sorted(arm["seconds"])[1]
            arm["seconds"] = (middle * random.normal(1, 0.005, rounds)).tolist()
    return of


def rows(before: dict[str, Any], after: dict[str, Any]) -> dict[str, compare.Row]:
    return {row.name: row for row in compare.rows(before, after)}


def test_an_arm_that_got_slower():
    found = rows(run(0), run(1, all=1.2))
    step = found["step/all"]
    assert step.seconds is not None and step.speed is not None
    assert step.seconds.factor == pytest.approx(1.2, rel=0.01) and step.seconds.moved
    assert step.speed.before == pytest.approx(4.2, rel=0.01)
    assert step.speed.factor == pytest.approx(1 / 1.2, rel=0.01) and step.speed.moved
    still = found["step/share_prompt"]
    assert still.seconds is not None and not still.seconds.moved
    assert found["step/naive"].speed is None  # it is its own base


def test_everything_of_a_run_is_compared():
    found = rows(run(0), run(1))
    assert {"rollout/native", "update/repeated", "update/G 8, 512 x 64, all", "step/trl", "memory/all"} <= found.keys()
    assert "ops/linear_grpo_loss 512x256x8192-float32-frozen/native" in found
    native = found["attention/shared_prefix_attention 2x9x3x5-4x2x16-float32/cpu"]
    assert native.speed is not None and native.speed.after == pytest.approx(0.8) and native.peak == (5.4, 5.4)
    grid = found["update/G 8, 512 x 64, all"]
    assert grid.speed is not None and grid.speed.before == pytest.approx(7.7) and grid.speed.p is None


def test_peak_memory():
    after = run(1)
    after["figures"]["sections"]["step"]["arms"]["all"]["peak_mib"] = 500.0
    line = next(line for line in compare.markdown(run(0), after).splitlines() if "step/all" in line)
    assert [cell.strip() for cell in line.split("|")][-4:-1] == ["400", "500", "+25.0%"]


DIFFERENT: dict[str, tuple[Callable[[dict[str, Any]], Any], str, bool]] = {  # what, its warning, whether times compare
    "machine": (lambda of: of.update(machine="another"), "machine is AMD EPYC, 2 threads in A and another in B", False),
    "threads": (lambda of: of["figures"].update(threads=1), "threads is 2 in A and 1 in B", False),
    "shape": (lambda of: of["figures"].update(shape="tiny"), "shape is bench in A and tiny in B", False),
    "sizes": (
        lambda of: of["figures"]["sizes"].update(num_generations=4),
        "sizes/num_generations is 8 in A and 4 in B",
        False,
    ),
    "versions": (
        lambda of: of["versions"].update(torch="2.14.0"),
        "versions/torch is 2.13.0+cpu in A and 2.14.0 in B",
        True,
    ),
    "a package": (lambda of: of["versions"].update(trl="1.16"), "versions/trl is absent in A and 1.16 in B", True),
}


@pytest.mark.parametrize(("change", "warning", "absolute"), DIFFERENT.values(), ids=DIFFERENT.keys())
def test_what_differs_is_named(change: Callable[[dict[str, Any]], Any], warning: str, absolute: bool):
    before, after = run(0), run(1, all=1.2)
    change(after)
    text = compare.markdown(before, after)
    assert f"- warning: {warning}\n" in text
    assert ("change of time" in text) == absolute
    step = rows(before, after)["step/all"]
    assert (step.seconds is not None) == absolute
    assert step.speed is not None and step.speed.factor == pytest.approx(1 / 1.2, rel=0.01)


def test_two_runs_alike_bring_no_warning():
    assert compare.warnings(run(0), run(1)) == []


def test_a_run_that_was_stopped_is_named():
    after = run(1)
    after["figures"] |= {"complete": False, "unfinished": ["step", "memory"]}
    assert compare.warnings(run(0), after) == ["B was stopped before its end: not complete are step, memory"]


def test_another_base_is_no_ratio_to_compare():
    after = run(1)
    after["figures"]["sections"]["step"]["arms"]["trl"]["base"] = "naive"
    assert compare.warnings(run(0), after) == ["the base of step/trl is all in A and naive in B"]
    assert rows(run(0), after)["step/trl"].speed is None


def test_an_arm_of_one_run_alone_is_named():
    after = run(1)
    del after["figures"]["sections"]["step"]["arms"]["trl"], after["figures"]["sections"]["memory"]
    text = compare.markdown(run(0), after)
    assert "Only in A: step/trl, memory/naive, memory/all" in text and "Only in B" not in text


def compared(tmp_path: Path, before: dict[str, Any], after: dict[str, Any], *words: str) -> int:
    return compare.main([str(written(tmp_path, before, "a.json")), str(written(tmp_path, after, "b.json")), *words])


STATUS = {
    "slower by more": ({"all": 1.2}, ["--fail-over", "5"], 1),
    "slower by less": ({"all": 1.2}, ["--fail-over", "30"], 0),
    "faster": ({"all": 0.8}, ["--fail-over", "5"], 0),
    "as before": ({}, ["--fail-over", "0.5"], 0),
    "not asked": ({"all": 1.2}, [], 0),
}


@pytest.mark.parametrize(("factors", "words", "status"), STATUS.values(), ids=STATUS.keys())
def test_exit_status(tmp_path: Path, capsys: Any, factors: dict[str, float], words: list[str], status: int):
    assert compared(tmp_path, run(0), run(1, **factors), *words) == status
    printed = capsys.readouterr()
    assert "| step/all" in printed.out and "a.json, commit abc1234" in printed.out
    slower = [line.split(":")[1].strip() for line in printed.err.splitlines()]
    assert slower == (["update/all", "step/all"] if status else [])


def test_a_change_within_noise_is_no_failure(tmp_path: Path, capsys: Any):
    before, after = run(0), run(1)
    for of, seconds in ((before, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]), (after, [1.1, 1.2, 1.3, 1.5, 1.6, 1.7, 1.8])):
        of["figures"]["sections"]["step"]["arms"]["all"]["seconds"] = seconds
    assert compared(tmp_path, before, after, "--fail-over", "5") == 0
    assert re.search(r"\| step/all .*\| 1,300 \| 1,500 \| +\+15\.4% \|", capsys.readouterr().out)  # no star


def test_between_machines_the_ratio_is_judged(tmp_path: Path, capsys: Any):
    # Twice as slow as a whole; packing is worse than that.
    slow = {name: 2.0 for name in ("naive", "all", "share_prompt", "frozen naive", "frozen", "trl", "repeated")}
    after = run(1, **slow, pack=2.4, native=2.0, transformers=2.0)
    after["machine"] = "another"
    assert compared(tmp_path, run(0), after, "--fail-over", "5") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"slower: step/pack: speed against its base changed by -1[67]\.\d%, p 0\.0", line)  # 2.0 / 2.4


def test_what_cannot_be_judged_is_refused(tmp_path: Path, capsys: Any):
    other = run(1)
    other["figures"]["shape"] = "tiny"
    assert compared(tmp_path, run(0), other, "--fail-over", "5") == 2
    assert "there is nothing to judge" in capsys.readouterr().err
    assert compared(tmp_path, run(0, rounds=3), run(1, rounds=3, all=2.0), "--fail-over", "5") == 2
    assert "no arm has enough rounds" in capsys.readouterr().err


def test_a_file_that_is_no_result(tmp_path: Path, capsys: Any):
    (tmp_path / "b.json").write_text("{}")
    assert compare.main([str(written(tmp_path, run(), "a.json")), str(tmp_path / "b.json")]) == 2
    assert "b.json: the file has no machine" in capsys.readouterr().err


def test_slower_needs_the_same_work():
    other = run(1)
    other["figures"]["sizes"]["prompts"] = 4
    with pytest.raises(ResultError, match="sizes"):
        compare.slower(run(0), other, 5)
