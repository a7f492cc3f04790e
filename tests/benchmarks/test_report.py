"""Reports, the table of README.md, and comparisons of two runs by arithmetic done by hand and by scipy."""

import json
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import mannwhitneyu

from benchmarks import compare, readme, report
from tests.helpers.small_bench import result, row
from vlmr1.errors import UserError

ARMS = {
    "naive": row([8.0, 10.0, 12.0], peak_mib=3000.0, planned_mib={"policy": 2800.0, "update": 100.0}),
    "all": row([2.0, 2.0, 3.0], peak_mib=500.0, phases={"rollout": [1.0, 1.0, 1.5], "update": [0.1, 0.2, 0.3]}),
    "trl": row([16.0, 17.0, 20.0], group="peer", peak_mib=4000.0),
}


def written(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def cells(text: str, first: str) -> list[str]:
    """The cells of the line that begins with this one."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_arms_has_ratios_of_medians_and_their_range():
    part = report.arms_part(ARMS)
    assert part.head[:5] == ["arm", "base", "times as fast", "ms", "range"]
    assert part.rows[0] == ["an arm", "-", "1", "10,000", "8,000..12,000", "3.00", "3,000", "2,800"]
    assert part.rows[1][1:6] == ["naive", "5.00 (4.00..5.00)", "2,000", "2,000..3,000", "15.0"]
    assert part.rows[2][2] == "0.59 (0.50..0.60)"


def test_phases_memory_and_the_grid_have_tables_of_their_own():
    assert report.phases_part(ARMS).rows == [["an arm", "1,000", "200"]]
    measured = {"rollout": 10.0, "forward": 50.0, "backward": 70.0, "update": 30.0}
    planned = {"rollout": 12.0, "policy": 66.0, "update": 31.0}
    part = report.memory_part({"all": row([1.0], memory_by_phase=measured, planned_mib=planned)})
    assert part.rows == [["an arm", "10 / 12", "- / -", "70 / 66", "30 / 31"]]
    cell = {"num_generations": 8, "prompt_tokens": 298, "seconds": {"naive": [6.0], "all": [1.5]}}
    assert report.grid_part([cell]).rows == [["298", "8", "4.00"]]


def test_a_page_has_the_tables_the_chart_and_the_reasons(tmp_path: Path, capsys: Any):
    content = result(**ARMS) | {"complete": False, "skipped": {"pack": "planned at 40 GiB <b>"}}
    path = written(tmp_path / "run.json", content)
    assert report.main([str(path)]) == 0
    html = (tmp_path / "run.html").read_text()
    assert "data:image/png;base64,iVBOR" in html and "5.00 (4.00..5.00)" in html
    assert "planned at 40 GiB &lt;b&gt;" in html and "http" not in html.replace("http://www.w3.org", "")
    said = capsys.readouterr().out
    assert "it was stopped before its end" in said and "| pack | planned at 40 GiB <b> |" in said


README = f"# A\n\n{readme.BEGIN}\n\nstale text\n\n{readme.END}\n\nrest\n"


def test_the_readme_is_renewed_and_checked(tmp_path: Path, capsys: Any):
    written(tmp_path / readme.RESULT, result(**ARMS))
    (tmp_path / "README.md").write_text(README)
    assert readme.main(["--check"], tmp_path) == 1
    assert "-stale text" in capsys.readouterr().out and (tmp_path / "README.md").read_text() == README
    assert readme.main([], tmp_path) == 0
    text = (tmp_path / "README.md").read_text()
    assert cells(text, "naive: nothing shared")[1:] == ["10.0 s", "5.0x", "3,000 MiB", "6.0x"]
    assert cells(text, "TRL 1.16")[1:] == ["17.0 s", "8.5x", "4,000 MiB", "8.0x"]
    assert cells(text, "vlmr1")[1:] == ["2.00 s", "1.0x", "500 MiB", "1.0x"]
    assert "a machine; medians of 3;" in text and "commit abc1234: `python -m x`" in text
    assert text.startswith("# A\n") and text.endswith("\n\nrest\n") and "stale" not in text
    assert readme.main(["--check"], tmp_path) == 0
    changed = result(**ARMS | {"all": row([4.0, 4.0, 4.0], peak_mib=500.0)})
    written(tmp_path / readme.RESULT, changed)
    assert readme.main(["--check"], tmp_path) == 1


@pytest.mark.parametrize("change", [{"arms": {"naive": ARMS["naive"]}}, {"complete": False}, {"rollout": True}])
def test_a_readme_does_not_quote_half_a_run(change: dict[str, Any]):
    with pytest.raises(UserError, match=r"step-cpu\.json.*no README quotes it"):
        readme.quoted(result(**ARMS) | change)


@pytest.mark.parametrize("text", ["none", readme.END + readme.BEGIN, README + README, README + readme.END])
def test_marks_must_be_there_once_and_in_order(text: str):
    with pytest.raises(UserError, match=r"README\.md"):
        readme.renewed(text, "new")


def test_p_is_that_of_the_rank_test():
    before, after = [1.0, 1.1, 1.2, 1.05, 1.15], [1.3, 1.4, 1.12, 1.6, 1.7]
    assert compare.p_value(before, after) == mannwhitneyu(before, after, alternative="two-sided").pvalue
    # of 252 ways to share out 10 ranks, one in each direction is the most uneven
    assert compare.p_value([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(2 / 252)
    assert compare.p_value([1, 2, 3, 4], [6, 7, 8, 9]) is None  # 2 / 70 is above the level
    assert compare.p_value([1.0] * 5, [1.0] * 5) == 1.0


SLOW = [3.0, 3.1, 3.2, 3.3, 3.4]
NAIVE, FAST = row([10.0] * 5, peak_mib=100.0), [2.0, 2.1, 2.2, 2.3, 2.4]


def pair(**change: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two runs; `all` takes longer in the second, beyond noise."""
    before = result(naive=NAIVE, all=row(FAST, peak_mib=40.0))
    return before, result(naive=NAIVE, all=row(SLOW, peak_mib=50.0)) | change


def test_changes_of_speed_time_and_memory():
    text = compare.text(*pair())
    # 10 / 2.2 and 10 / 3.2; 3.2 / 2.2; 50 / 40
    expected = ["4.55", "3.12", "-31.2% *", "2,200", "3,200", "+45.5% *", "40.0", "50.0", "+25.0% ?"]
    assert cells(text, "all")[1:] == expected
    assert cells(text, "naive")[1:] == ["-"] * 3 + ["10,000", "10,000", "+0.0%", "100", "100", "+0.0% ?"]


def test_times_of_other_machines_are_not_compared_and_differences_are_named():
    before, after = pair(machine="another", complete=False)
    del after["arms"]["naive"]
    after["arms"]["all"]["base"] = "all"
    text = compare.text(before, after)
    said = ("machine is a machine in A and another in B", "complete is True in A", "only in A: naive")
    assert all(each in text for each in said)
    assert cells(text, "all")[1:7] == ["-"] * 6


def test_fail_over_judges_times_on_one_machine_and_ratios_between_two(tmp_path: Path, capsys: Any):
    before, after = pair()
    paths = [str(written(tmp_path / f"{i}.json", run)) for i, run in enumerate((before, after))]
    assert compare.main([*paths, "--fail-over", "40"]) == 1
    assert "all: time changed by +45.5%" in capsys.readouterr().err
    for words in ([*paths, "--fail-over", "50"], paths, [paths[0]] * 2):
        assert compare.main(words) == 0
    (said,) = compare.slower(before, after | {"machine": "another"}, 5)
    assert said == f"all: time against its base changed by +45.5%, p {2 / 252:.2g}"
    with pytest.raises(UserError, match=r"--fail-over.*shape"):
        compare.slower(before, after | {"shape": "tiny"}, 5)
    few = {"naive": row([1.0, 2.0]), "all": row([1.0, 2.0])}
    with pytest.raises(UserError, match=r"--fail-over.*rounds"):
        compare.slower(result(**few), result(**few), 5)
