"""`vlmr1 report`: one HTML page of a training run, or of several, which may still be running."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's output_dir; several are compared")
    parser.add_argument(
        "--output", "--out", type=Path, help="default: training.html in the run; of several, comparison.html here"
    )


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vlmr1.report.comparison import NAME, write_comparison
    from vlmr1.report.training import write_run_report

    if len({path.resolve() for path in options.runs}) > 1:
        print(write_comparison(options.runs, options.output or Path(NAME)))
    else:
        print(write_run_report(options.runs[0], options.output))


def report_of_run(output_dir: Path) -> None:
    """Write the page of a finished run; warn where the disk has no room for it, or no package draws its curves."""
    from vlmr1.errors import OutputError, SettingError
    from vlmr1.lifecycle.console import ignore_broken_pipe
    from vlmr1.report.training import write_run_report

    try:
        path = write_run_report(output_dir)
    except (OutputError, SettingError) as error:
        logger.warning("%s", error)
        return
    with ignore_broken_pipe():
        print(f"report     {path}", flush=True)
