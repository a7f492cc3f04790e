"""`vlmr1 report`: one HTML page of a training run, which may still be running."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the run's output_dir")
    parser.add_argument("--out", type=Path, help="default: training.html in it")


def run(options: argparse.Namespace, rest: list[str]) -> None:
    from vlmr1.report.training import write_run_report

    print(write_run_report(options.run, options.out))


def report_of_run(output_dir: Path) -> None:
    """Write the page of a finished run; warn where the disk has no room for it."""
    from vlmr1.errors import OutputError
    from vlmr1.lifecycle.console import surviving
    from vlmr1.lifecycle.disk import writing
    from vlmr1.report.training import NAME, write_run_report

    try:
        with writing(NAME, output_dir):
            path = write_run_report(output_dir)
    except OutputError as error:
        logger.warning("%s", error)
        return
    with surviving():
        print(f"report     {path}", flush=True)
