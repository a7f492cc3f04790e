"""Tables of a suite's result against numbers computed by hand; what a file says cannot break Markdown or HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.suite import page, tables
from benchmarks.suite.parts import Table, number, percent, plain, spread
from tests.benchmarks.suite_result import LONG, result, written


def cells(table: Table) -> dict[str, dict[str, str]]:
    """Rows by name, each by column."""
    return {row[0]: dict(zip(table.head[1:], row[1:], strict=True)) for row in table.rows}


def by_cell(table: Table) -> list[tuple[str, ...]]:
    return [tuple(row) for row in table.rows]


def test_the_ablation_against_each_base():
    (table,) = tables.ablation(result()).tables
    found = cells(table)
    assert list(found) == ["naive", LONG, "pack alone", "naive, frozen tower", "frozen tower, features once", "all"]
    # medians 4.2 and 2.0 s; ratios of the rounds 4.0 / 2.1, 4.2 / 2.0, 4.4 / 2.0; 1024 tokens; 500 of 2000 MiB
    assert found[LONG] == {
        "base": "naive",
        "speed, x base's": "2.10 (1.90..2.20)",
        "ms": "2,000",
        "20..80 % of ms": "2,000..2,060",
        "tokens/s": "512",
        "peak memory, x base's": "0.25",
        "peak MiB": "500",
        "J a call": "-",
    }
    assert found["naive"]["speed, x base's"] == found["naive"]["peak memory, x base's"] == "1"
    assert found["frozen tower, features once"]["base"] == "naive, frozen tower"
    assert found["frozen tower, features once"]["speed, x base's"] == "1.50 (1.50..1.50)"
    assert found["all"]["J a call"] == "51.0"


def test_peers_take_times_as_long_as_all():
    (table,) = tables.peers(result()).tables
    found = cells(table)
    assert list(found) == ["all", "naive", "TRL 1.16"]
    assert found["TRL 1.16"]["time, x all's"] == "6.20 (6.00..6.20)"  # 6.2 / 1.0; 6.0 / 1.0, 6.2 / 1.0, 6.6 / 1.1
    assert found["TRL 1.16"]["peak memory, x all's"] == "6.50"
    assert found["all"]["time, x all's"] == "1"


def test_a_step_by_phase():
    (table,) = tables.phases(result()).tables
    assert list(cells(table)) == ["naive", LONG, "all"]  # the others have no phases
    assert cells(table)["all"] == {
        "rollout, ms": "500",
        "reward, ms": "10.0",
        "reference, ms": "100",
        "forward, ms": "130",
        "backward, ms": "200",
        "update, ms": "20.0",
    }


def test_rollout_and_update():
    (table,) = tables.rollout(result()).tables
    assert cells(table)["native"] == {
        "speed, x base's": "2.75 (2.50..2.75)",  # 2.2 / 0.8; 2.0 / 0.8, 2.2 / 0.8, 2.4 / 0.9
        "ms": "800",
        "20..80 % of ms": "800..860",
        "tokens/s": "1,280",
        "of floor": "25%",
    }
    (table,) = tables.update(result()).tables
    assert [row["utilization"] for row in cells(table).values()] == ["50%", "55%", "60%"]
    assert cells(table)["packed, nothing shared"]["speed, x base's"] == "1.10 (1.00..1.14)"  # 4.8 / 4.2 = 1.143


def test_a_peer_that_was_not_called_in_turn_has_no_range():
    of = result()
    arms = of["figures"]["sections"]["update"]["arms"]
    arms["repeated"] |= {"group": "peer", "in_turn": False}
    (table,) = tables.update(of).tables
    assert cells(table)["packed, nothing shared"]["speed, x base's"] == "1.10"
    assert cells(table)["all"]["speed, x base's"] == "5.50 (4.80..5.50)"


def test_phases_of_other_trainers_are_said_to_be_of_one_step():
    of = result()
    assert tables.phases(of).notes == ["Medians over rounds."]
    of["figures"]["sections"]["step"]["arms"]["trl"]["phases"] = {"rollout": [2.0]}
    assert "of other trainers one further step" in tables.phases(of).notes[0]


def test_a_run_that_was_stopped_says_so():
    of = result()
    assert not any("stopped" in note for note in tables.head(of).notes)
    of["figures"] |= {"complete": False, "unfinished": ["update", "memory"]}
    text = "This run was stopped before its end: not complete are update, memory. Here is what was measured until then."
    assert text in tables.head(of).notes


def test_the_grid():
    (table,) = tables.grid(result()).tables
    assert list(table.head) == ["prompt x completion", "G 2", "G 8"]
    assert by_cell(table) == [
        ("128 x 64", "1.70 (1.50..1.70), 1.80", "4.20 (4.00..4.20), 4.60"),
        ("512 x 64", "2.00 (2.00..2.10), 1.96", "7.70 (7.00..8.00), 7.03"),
    ]


def test_memory_and_ops():
    (table,) = tables.memory(result()).tables
    assert by_cell(table)[1] == ("all", "400", "0.20", "120", "160", "320", "400")
    (table,) = tables.ops(result(), "attention").tables
    case = ("shared_prefix_attention", "2x9x3x5-4x2x16-float32")
    assert by_cell(table)[1] == (*case, "cpu", "1.25", "1.25", "72%", "3")


def test_what_was_left_out_and_the_time_of_the_run():
    skipped, seconds = tables.ending(result())
    head, attention = "linear_grpo_loss 512x256x8192-float32-frozen", "shared_prefix_attention 2x9x3x5-4x2x16-float32"
    assert skipped.points == [
        "liger-kernel is not installed: step/trl+liger",
        "needs a GPU: step/cuda_graphs",
        f"runs on cuda: ops/{head}/triton, attention/{attention}/triton",
    ]
    assert by_cell(seconds.tables[0]) == [("ops", "12"), ("step", "40"), ("together", "53")]


def test_the_machine_comes_first_and_a_cpu_is_called_one():
    head = tables.head(result())
    assert any("AMD EPYC, 2 threads" in note for note in head.notes)
    assert any("without a GPU" in note for note in head.notes)
    of = result()
    of["figures"].update(device="cuda", driver="580.1")
    assert not any("without a GPU" in note for note in tables.head(of).notes)
    assert "driver: 580.1" in tables.head(of).points


NUMBERS = {12345.6: "12,346", 757.86: "758", 34.27: "34.3", 3.386: "3.39", 0.2504: "0.250"}


@pytest.mark.parametrize(("value", "text"), NUMBERS.items())
def test_about_three_digits(value: float, text: str):
    assert number(value) == text


def test_per_cents():
    assert [percent(share) for share in (1.04, 0.25, 0.01, 0.0042)] == ["104%", "25%", "1%", "0.42%"]


def test_spread_of_samples():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 1e3) == "2,000..5,000"
    assert spread([0.5]) == "0.500"


def test_text_of_a_file_stays_text():
    assert plain("a | b\n<img> & c") == "a \\| b &lt;img> &amp; c"


@pytest.mark.parametrize("section", ("step", "rollout", "update", "memory", "ops", "attention"))
def test_a_section_that_did_not_run_is_left_out(section: str):
    of = result()
    del of["figures"]["sections"][section]
    names = {part.name for part in tables.parts(of)}
    gone = {"step": {"ablation", "peers", "phases"}, "update": {"update", "grid"}}.get(section, {section})
    assert names == {part.name for part in tables.parts(result())} - gone


class Page(HTMLParser):
    """Tags, sources and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


CHARTS = ["ablation", "phases", "grid", "memory", "ops", "attention"]


def test_files_beside_the_result(tmp_path: Path, capsys: Any):
    path = written(tmp_path, result())
    assert page.main([str(path)]) == 0
    names = ["run.md", *(f"run-{chart}.png" for chart in CHARTS), "run.html"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    markdown = (tmp_path / "run.md").read_text()
    assert re.findall(r"!\[.*?\]\((.*?)\)", markdown) == [
        f"run-{chart}.png" for chart in ("ablation", "phases", "grid", "memory", "ops", "attention")
    ]
    assert "same \\| &lt;loss>" in markdown and "<loss>" not in markdown
    for chart in CHARTS:
        with Image.open(BytesIO((tmp_path / f"run-{chart}.png").read_bytes())) as image:
            assert image.format == "PNG" and image.width >= 900


def test_the_page_needs_nothing_but_itself(tmp_path: Path):
    of = result()
    of["figures"]["sections"]["step"]["arms"]["pack"]["label"] = "<script>alert(1)</script>"
    of["machine"] = 'A & "B" <b>'
    page.write(written(tmp_path, of), tmp_path / "out")
    text = (tmp_path / "out" / "run.html").read_text()
    found = Page(text)
    assert not {"script", "link", "b", "loss", "iframe"} & set(found.tags)
    assert len(found.sources) == len(CHARTS) and all(
        each.startswith("data:image/png;base64,") for each in found.sources
    )
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "<script>alert(1)</script>" in found.text and 'A & "B" <b>' in found.text and "same | <loss>" in found.text
    assert "2.10 (1.90..2.20)" in found.text
