"""The report of a result: Markdown, charts as PNG, and one HTML file without network or script."""

from __future__ import annotations

import argparse
import sys
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from benchmarks.suite.charts import charts
from benchmarks.suite.parts import Part, Table, plain
from benchmarks.suite.reading import Result, read
from benchmarks.suite.tables import parts
from vlmr1.errors import UserError
from vlmr1.report.html import document

# The page of reports has tables of two columns; these are wide, their first column is text.
STYLE = """<style>
.wide { overflow-x: auto; }
.wide table { font-size: 13.5px; font-variant-numeric: tabular-nums; }
.wide th, .wide td { padding: 6px 12px; }
.wide td, .wide th + th { text-align: right; white-space: nowrap; }
.wide tbody th { min-width: 9em; text-align: left; }
img.curve { margin: 14px 0; max-width: 1000px; }
li { margin: 3px 0; max-width: 96ch; overflow-wrap: anywhere; }
</style>"""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite report", description=__doc__)
    parser.add_argument("file", type=Path, help="result file of the suite, JSON")
    parser.add_argument("--out", type=Path, help="folder to write to; default: beside the file")
    options = parser.parse_args(words)
    try:
        for path in write(options.file, options.out):
            print(path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def write(result_path: Path, out: Path | None = None) -> list[Path]:
    """Write NAME.md, NAME-CHART.png and NAME.html beside NAME.json, or in `out`; their paths.

    ResultError where the file is no result of the suite."""
    result = read(result_path)
    folder, name = out or result_path.parent, result_path.stem
    drawn = charts(result)
    files = {f"{name}.md": markdown(result, {chart: f"{name}-{chart}.png" for chart in drawn}).encode()}
    files |= {f"{name}-{chart}.png": picture for chart, picture in drawn.items()}
    files[f"{name}.html"] = page(result, drawn).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return [folder / file for file in files]


def markdown(result: Result, pictures: Mapping[str, str]) -> str:
    """The report as Markdown; `pictures`: file name of each chart."""
    blocks = [f"# {plain(_title(result))}"]
    for part in parts(result):
        blocks.append(f"## {part.title}")
        blocks += [plain(note) for note in part.notes]
        blocks += [table.markdown() for table in part.tables]
        blocks += ["\n".join(f"- {plain(point)}" for point in part.points)] if part.points else []
        blocks += [f"![{part.title}]({pictures[chart]})" for chart in part.charts if chart in pictures]
    return "\n\n".join(blocks) + "\n"


def page(result: Result, pictures: Mapping[str, bytes]) -> str:
    """The report as one HTML file, the charts inside."""
    title = _title(result)
    body = [STYLE, f"<h1>{escape(title)}</h1>"]
    for part in parts(result):
        body += _html(part, pictures)
    return document(title, body)


def _title(result: Result) -> str:
    return f"Benchmarks: {result['figures']['shape']} on {result['machine']}"


def _html(part: Part, pictures: Mapping[str, bytes]) -> list[str]:
    body = [f"<h2>{escape(part.title)}</h2>"]
    body += [f'<p class="note">{escape(note)}</p>' for note in part.notes]
    for chart in part.charts:
        if chart in pictures:
            uri = f"data:image/png;base64,{b64encode(pictures[chart]).decode()}"
            body.append(f'<img class="curve" alt="{escape(part.title)}" src="{uri}">')
    body += [_table(table) for table in part.tables]
    body += [f"<ul>{''.join(f'<li>{escape(point)}</li>' for point in part.points)}</ul>"] if part.points else []
    return body


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    rows = []
    for first, *others in table.rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        rows.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


if __name__ == "__main__":
    sys.exit(main())
