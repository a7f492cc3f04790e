"""Pass rates and mean rewards of rated rows: metrics, and the rows written with both as columns."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmr1.data.pass_rates import MEAN_REWARD, PASS_RATE
from vlmr1.data.rows import Rows
from vlmr1.data.samples import Samples
from vlmr1.evaluation.bootstrap import ratio
from vlmr1.evaluation.outputs import slug
from vlmr1.evaluation.rate import RatedRow
from vlmr1.evaluation.scoring import Scored
from vlmr1.lifecycle.checkpoint import replacing
from vlmr1.report.cases import Case

DIGITS = 6  # of the columns
SUFFIXES = (".jsonl", ".json", ".parquet")


def rate_rows(
    samples: Samples, records: Sequence[RatedRow], weights: Sequence[float], deciding: int, threshold: float
) -> tuple[Scored, dict[str, list[float]]]:
    """Return the metrics of all rows, and the columns `pass_rate` and `mean_reward`.

    A completion passes where its reward number `deciding` is at least `threshold`. The mean is of the weighted sum of
    its rewards, over the completions of the row."""
    rewards = np.array([record.rewards for record in records], dtype=np.float32)  # [rows, G, R]
    rates = (rewards[:, :, deciding] >= np.float32(threshold)).mean(1)
    means = (rewards.astype(np.float64) * np.array(weights)).sum(2).mean(1)
    cut = [np.mean([reason == "length" for reason in record.finish_reasons]) for record in records]
    metrics = {
        PASS_RATE: ratio(rates.tolist()),
        MEAN_REWARD: ratio(means.tolist()),
        "always_pass_share": ratio((rates == 1).astype(float).tolist()),
        "never_pass_share": ratio((rates == 0).astype(float).tolist()),
        "truncated_share": ratio([float(each) for each in cut]),
    }
    counts = {"rows": len(records), "always_pass": int((rates == 1).sum()), "never_pass": int((rates == 0).sum())}
    counts["timed_out"] = sum(record.timed_out for record in records)
    cases = [
        Case(sample=sample, completion=record.completions[0], score=float(rate), solution=sample.solution)
        for sample, record, rate in zip(samples, records, rates, strict=True)
    ]
    columns = {PASS_RATE: rates.round(DIGITS).tolist(), MEAN_REWARD: means.round(DIGITS).tolist()}
    return Scored(metrics, counts, cases), columns


def write_rows(samples: Samples, folder: Path, columns: Mapping[str, Sequence[float]]) -> dict[Path, Path | None]:
    """Write the rows of each data file with these columns to `NAME.rated.jsonl`, those of tables to
    `NAME.rated.parquet`. Return the paths in the order of the files, with their image folders. A column of the same
    name is replaced."""
    added: dict[Rows, dict[int, dict[str, float]]] = {rows: {} for rows, _ in samples.sources}  # by place in the file
    for number, index in enumerate(samples.indices):
        rows, place = samples.place(index)
        added[rows][place] = {name: values[number] for name, values in columns.items()}
    paths: dict[Path, Path | None] = {}
    for rows, images in samples.sources:
        if added[rows]:
            table = rows.table(list(added[rows]))
            path = _path(folder, Path(rows.name), "rated.jsonl" if table is None else "rated.parquet", paths)
            with replacing(path) as replacement:
                if table is None:
                    _write_lines(replacement, rows, added[rows])
                else:
                    _write_table(replacement, table, list(added[rows].values()))
            paths[path] = images.folder
    return paths


def _path(folder: Path, name: Path, suffix: str, taken: Collection[Path]) -> Path:
    """Return the path of a file's rated rows; a second file of the same name gets a number."""
    stem = slug(name.stem if name.suffix.lower() in SUFFIXES else name.name)
    path = folder / f"{stem}.{suffix}"
    return folder / f"{stem}-{len(taken) + 1}.{suffix}" if path in taken else path


def _write_lines(path: Path, rows: Rows, added: Mapping[int, Mapping[str, float]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for place, more in added.items():
            file.write(json.dumps({**rows.read(place), **more}) + "\n")


def _write_table(path: Path, table: Any, added: Sequence[Mapping[str, float]]) -> None:
    for name in added[0]:
        table = table.remove_columns([name] if name in table.column_names else [])
        table = table.add_column(name, [more[name] for more in added])
    table.to_parquet(str(path))
