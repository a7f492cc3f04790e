"""`vlmr1 evaluate`: evaluate each model, print its table, and compare the models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlmr1.distributed.ranks import process_group
from vlmr1.evaluation.arguments import Compare, Evaluate, parse
from vlmr1.evaluation.compare import COMPARISON, compare, comparison
from vlmr1.evaluation.job import evaluate_model
from vlmr1.evaluation.outputs import slugs
from vlmr1.evaluation.results import PAGE, RESULTS, Results


def run(options: argparse.Namespace, rest: Sequence[str]) -> None:
    asked = parse(rest)
    if isinstance(asked, Compare):
        text = compare(asked.folders)
        _write(asked.out or asked.folders[0] / COMPARISON, text)
        print(text, end="")
    else:
        _evaluate(asked)


def _evaluate(asked: Evaluate) -> None:
    slugs(asked.models)
    found: list[Results] = []
    with process_group(asked.output.ddp_timeout) as ranks:
        for model in asked.models:
            results = evaluate_model(model, asked.options, asked.output, ranks)
            if results is not None:
                print(table(results), flush=True)
                folder = asked.output.folder(model)
                print(f"results  {folder / RESULTS}\npictures {folder / PAGE}", flush=True)
                found.append(results)
        if len(found) > 1:
            text = comparison(found)
            _write(asked.output.output_dir / COMPARISON, text)
            print(f"\n{text}", end="")
        ranks.barrier()  # a failure of the first rank ends all


def table(results: Results) -> str:
    """Return the table of one model for the console."""
    rows = [("metric", "value", "95% interval"), *results.table()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    head = f"{results.model}: {results.content['options']['task']}, {results.content['rows']['count']} rows"
    lines = (f"{name:{widths[0]}}  {value:>{widths[1]}}  {interval:>{widths[2]}}" for name, value, interval in rows)
    return "\n".join([head, *(line.rstrip() for line in lines)])


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
