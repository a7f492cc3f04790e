"""What the charts draw is what the result says, and their words do not lie on each other."""

from __future__ import annotations

from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.suite import charts
from tests.benchmarks.suite_result import arm, phases, result

SECTIONS = result()["figures"]["sections"]
STEP, GRID, MEMORY = SECTIONS["step"]["arms"], SECTIONS["update"]["grid"], SECTIONS["memory"]["arms"]


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    return figure


def test_bars_of_the_ablation():
    (axes,) = drawn(charts.ablation(STEP)).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([2.1, 1.0, 1.5, 4.2])
    names = [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]
    assert names[1:] == ["pack alone", "frozen tower, features once (base: naive, frozen tower)", "all"]
    whiskers = [segment[:, 0].tolist() for segment in axes.collections[0].get_segments()]
    assert whiskers[0] == pytest.approx([4.0 / 2.1, 2.2])


def test_phases_on_each_other():
    (axes,) = drawn(charts.phases(STEP)).axes
    rows = {place: [bar for bar in axes.patches if round(bar.get_y() + 0.33) == place] for place in range(3)}
    naive = rows[0]
    assert [bar.get_width() for bar in naive] == pytest.approx(
        [1.5, 0.01, 0.6, 0.8, 1.2, 0.05, 0.04]
    )  # the rest of 4.2
    assert [bar.get_x() for bar in naive] == pytest.approx([0, 1.5, 1.51, 2.11, 2.91, 4.11, 4.16])
    assert "4.20 s" in [text.get_text() for text in axes.texts]


def test_lines_of_the_grid_with_their_prediction():
    axes = drawn(charts.grid(GRID)).axes[0]
    lines = [line for line in axes.get_lines() if line.get_linestyle() in ("-", "--") and len(line.get_xdata()) == 2]
    found = {(line.get_linestyle(), *line.get_ydata()): list(line.get_xdata()) for line in lines}
    for line in (("-", 1.7, 4.2), ("--", 1.8, 4.6), ("-", 2.0, 7.7), ("--", 1.96, 7.03)):
        assert found[line] == pytest.approx([2, 8], rel=0.02)  # lines are drawn a little aside


def test_memory_of_both_on_one_scale():
    naive, whole = drawn(charts.memory(MEMORY)).axes
    assert naive.get_ylim() == whole.get_ylim() == pytest.approx((0, 2300))
    assert naive.get_title(loc="left") == "naive\npeak 2,000 MiB"
    (line, _) = whole.get_lines()
    assert max(line.get_ydata()) == 400
    spans = [(patch.get_x(), patch.get_width()) for patch in whole.patches]
    assert [each for span in spans[:2] for each in span] == pytest.approx([0, 0.35, 0.35, 0.02])
    assert len(spans) == 5  # what has no phase is not shaded


def test_marks_at_the_share_of_the_ceiling():
    (axes,) = drawn(charts.ceilings(SECTIONS["attention"], "Attention")).axes
    marks = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() != "None" and len(line.get_xdata())]
    assert marks == [0.9, 0.72]


def test_a_chart_without_its_section_is_left_out():
    of = result()
    del of["figures"]["sections"]["memory"], of["figures"]["sections"]["update"]["grid"]
    for each in of["figures"]["sections"]["step"]["arms"].values():
        each.pop("phases", None)
    assert charts.charts(of).keys() == {"ablation", "ops", "attention"}


def crowded() -> dict[str, Figure | None]:
    """Many arms with long names."""
    names = [f"kernels: some_long_operation_{number}=native on top of naive, alone" for number in range(9)]
    many = STEP | {name: arm(name, [2.0, 2.1, 2.2], phases=phases(0.5, 0.1, 0.2, 0.3, 0.4, 0.1)) for name in names}
    cases = {f"{key} {number}": case for key, case in SECTIONS["ops"].items() for number in range(12)}
    return {
        "ablation": charts.ablation(many),
        "phases": charts.phases(many),
        "grid": charts.grid([{**cell, "completion_tokens": length} for cell in GRID for length in (32, 64, 128, 512)]),
        "memory": charts.memory(MEMORY),
        "ops": charts.ceilings(cases, "Ops"),
    }


@pytest.mark.parametrize("name", ("ablation", "phases", "grid", "memory", "ops"))
def test_words_do_not_lie_on_each_other(name: str):
    figure = drawn(crowded()[name])
    figure.supxlabel("caption")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    words = [
        text for axes in figure.axes if axes.get_visible() for text in (*axes.texts, axes.xaxis.label, axes.yaxis.label)
    ]
    words += [
        text for axes in figure.axes if axes.get_visible() for text in (*axes.get_yticklabels(), axes._left_title)
    ]
    words += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [
        (text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in words if text.get_text().strip()
    ]
    boxes = [(text, box) for text, box in boxes if box.width > 1]
    assert len(boxes) > 5
    for text, box in boxes:
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height, text
    assert not [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]
