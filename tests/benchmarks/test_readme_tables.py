"""The tables of the READMEs are what the result files say."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import RESULTS
from benchmarks.suite import quoted, readme
from benchmarks.suite.reading import ResultError, read_any
from tests.benchmarks.suite_result import result, written


def test_readme_and_results_agree(capsys: Any):
    status = readme.main(["--check"])
    assert status == 0, f"run `python -m benchmarks.suite.readme`:\n{capsys.readouterr().out}"


def test_every_mark_is_a_whole_line():
    """A mark with a slip in it would be passed over."""
    for name in readme.FILES:
        for line in (readme.ROOT / name).read_text().splitlines():
            if re.search(r"<!--\s*(table|end)", line):
                assert readme.START.fullmatch(line) or line == readme.END, line


def test_numbers_that_are_quoted():
    """By hand, from the files: medians of 7 samples and their ratios."""
    text = quoted.step(read_any(RESULTS / "step.json"))
    assert re.search(r"\| naive: all sharing off +\| +5\.8x \(5\.6 to 6\.4\) \| +5\.8x \|", text)
    assert re.search(r"\| TRL 1\.16, same weights, completions and loss \| +8\.2x \(7\.6 to 8\.7\) \| +7\.4x \|", text)
    text = quoted.rollout(read_any(RESULTS / "rollout-cpu.json")).replace("\n", " ")
    assert (
        "draws 2.7x (2.3 to 2.7) the tokens" in text and "takes TRL 1.16 4.0x (3.9 to 4.4) as long, with 6.0x" in text
    )
    text = quoted.plan(read_any(RESULTS / "plan-cpu.json")).replace("\n", " ")
    assert "15 shapes) the plan is within 11%, within 3% in 12 of them" in text
    text = quoted.memory(read_any(RESULTS / "memory-cpu.json"))
    assert re.search(r"\| use_peft, load_in_4bit +\| +578 \| +policy \| +0\.42 \|", text)
    text = quoted.head_op(read_any(RESULTS / "linear_grpo_loss-cpu.json"))
    assert re.search(r"\|  +\| bfloat16 \| trained \| +1\.12 \| +1\.39 \| +5\.5 \| +11\.5 \|", text)
    text = quoted.head_op_peers(read_any(RESULTS / "linear_grpo_loss-cpu-peers.json"))
    assert re.search(r"\| TRL 1\.16, chunked +\| +3\.77 \| 134\.0 \| +8\.66 \| 130\.7 \|", text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the READMEs and their result files."""
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    (tmp_path / "kernels").mkdir()
    for name in readme.FILES:
        shutil.copy(readme.ROOT / name, tmp_path / name)
    return tmp_path


def test_a_number_changed_by_hand_is_shown_and_mended(root: Path, capsys: Any):
    path = root / "README.md"
    right = path.read_text()
    path.write_text(right.replace("8.2x (7.6 to 8.7)", "9.9x (7.6 to 8.7)"))
    assert readme.main(["--check"], root) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^-\| TRL .*9\.9x", shown, re.M) and re.search(r"^\+\| TRL .*8\.2x", shown, re.M)
    assert "9.9x" in path.read_text()  # a check writes nothing
    assert readme.main([], root) == 0
    assert path.read_text() == right
    assert readme.main(["--check"], root) == 0


def test_a_result_that_changed_is_noticed(root: Path):
    path = root / "benchmarks" / "results" / "memory-cpu.json"
    path.write_text(path.read_text().replace("501.84765625", "601.84765625"))
    assert readme.main(["--check"], root) == 1
    assert readme.main([], root) == 0
    assert re.search(r"\| gradient_checkpointing +\| +602 \| +policy \| +0\.44 \|", (root / "README.md").read_text())


def marked(root: Path, text: str) -> Path:
    path = root / "README.md"
    path.write_text(text)
    return path


WRONG = {
    "no end": ("a\n<!-- table plan from benchmarks/results/plan-cpu.json -->\n", r"README\.md:2: this table has no"),
    "two starts": (
        "<!-- table plan from benchmarks/results/plan-cpu.json -->\n" * 2 + "<!-- end -->\n",
        r"README\.md:1: this table has no <!-- end --> before the next",
    ),
    "an end alone": ("a\nb\n<!-- end -->\n", r"README\.md:3: <!-- end --> without a table"),
    "no such table": (
        "<!-- table plans from benchmarks/results/plan-cpu.json -->\n<!-- end -->\n",
        r"README\.md:1: no table is called 'plans'; known: step-update,",
    ),
    "no such file": (
        "<!-- table plan from benchmarks/results/none.json -->\n<!-- end -->\n",
        r"none\.json: cannot be read",
    ),
    "a file of something else": (
        "<!-- table plan from benchmarks/results/step.json -->\n<!-- end -->\n",
        r"README\.md:1: step\.json has no 'shapes' for the table 'plan'",
    ),
    "no result of the suite": (
        "<!-- table ablation from benchmarks/results/step.json -->\n<!-- end -->\n",
        r"step\.json: not a result of the suite",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_mark_is_named(root: Path, text: str, message: str, capsys: Any):
    path = marked(root, text)
    with pytest.raises(ResultError, match=message):
        readme.renewed(path, root)
    assert readme.main([], root) == 2
    assert re.search(message, capsys.readouterr().err)
    assert path.read_text() == text


SUITE = {
    "ablation": r"\| all +\| +naive \| 4\.20 \(4\.00\.\.4\.20\) \|",
    "peers": r"\| TRL 1\.16 \| 6\.20 \(6\.00\.\.6\.20\) \|",
    "phases": r"\| all +\| +500 \| +10\.0 \|",
    "rollout": r"\| native +\| 2\.75 \(2\.50\.\.2\.75\) \|",
    "update": r"\| all +\| 5\.50 \(4\.80\.\.5\.50\) \|.* 60% \|",
    "grid": r"\| 512 x 64 +\| 2\.00 \(2\.00\.\.2\.10\), 1\.96 \|",
    "memory": r"\| all +\| +400 \| +0\.20 \|",
    "ops": r"\| native \| 24 \| +0\.96 \| +104% \|",
    "attention": r"\| +cpu \| 1\.25 \| +1\.25 \| +72% \|",
}


def test_every_table_of_the_suite_is_tried():
    assert SUITE.keys() == readme.SUITE.keys()


@pytest.mark.parametrize(("name", "line"), SUITE.items())
def test_tables_of_the_suite(root: Path, name: str, line: str):
    written(root, result())
    path = marked(root, f"before\n\n<!-- table {name} from run.json -->\nold\n<!-- end -->\n\nafter\n")
    assert readme.main([], root) == 0
    text = path.read_text()
    assert text.startswith(f"before\n\n<!-- table {name} from run.json -->\n\n") and text.endswith(
        "\n\n<!-- end -->\n\nafter\n"
    )
    assert re.search(line, text) and "old" not in text
    assert "AMD EPYC, 2 threads; bench, float32, 12.3 million parameters" in text and "commit abc1234" in text
    assert readme.main(["--check"], root) == 0


SAMPLES = {
    "ablation": "medians of 3;",
    "grid": "medians of 2 to 3;",
    "update": "medians of 3;",
    "ops": "medians of 5;",
    "memory": "once each;",
}


@pytest.mark.parametrize(("name", "words"), SAMPLES.items())
def test_how_many_samples_a_table_is_of(tmp_path: Path, name: str, words: str):
    of = result()
    sections = of["figures"]["sections"]
    sections["update"]["grid"][0]["seconds"] = {"naive": [1.6, 1.7], "all": [1.0, 1.0]}
    for case in sections["ops"].values():
        case["seconds"] = {arm: [1.0] * 5 for arm in case["seconds"]}
    assert words in readme.quote(name, written(tmp_path, of), "README.md:1").splitlines()[-1]


def test_a_run_that_was_stopped_is_not_quoted(tmp_path: Path):
    of = result()
    of["figures"] |= {"complete": False, "unfinished": ["memory"]}
    with pytest.raises(ResultError, match=r"run\.json: the run was stopped before its end: not complete are memory"):
        readme.quote("ablation", written(tmp_path, of), "README.md:1")


def test_a_section_that_did_not_run_is_named(root: Path):
    of = result()
    del of["figures"]["sections"]["rollout"]
    written(root, of)
    path = marked(root, "<!-- table rollout from run.json -->\n<!-- end -->\n")
    with pytest.raises(ResultError, match=r"run\.json has no 'rollout' for the table 'rollout'"):
        readme.renewed(path, root)
