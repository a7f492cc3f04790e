"""One model on the rows of an evaluation: decode what is missing, score, write the results."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vlmr1.errors import SettingError, UserError
from vlmr1.evaluation.decode import Decoder
from vlmr1.evaluation.fingerprint import begin, identity
from vlmr1.evaluation.options import Options
from vlmr1.evaluation.ranks import Ranks, device
from vlmr1.evaluation.records import Record, RecordFiles, append
from vlmr1.evaluation.results import RESULTS, Results, write_results
from vlmr1.evaluation.rows import load_rows
from vlmr1.evaluation.scoring import Scored, score_task
from vlmr1.evaluation.vqa import CLICK, method_of
from vlmr1.models import load_model, load_processor, model_type_of
from vlmr1.report.cases import write_cases
from vlmr1.rewards.pool import RewardPool
from vlmr1.tiny import model_path
from vlmr1.types import Sample
from vlmr1_kernels import use

RUN = "run.json"
PAGE = "cases.html"
SLUG_LENGTH = 80


@dataclass(frozen=True)
class Around:
    """What has no part in a result: where it goes, what is shown, how it is run."""

    output_dir: Path
    pictures: int = 12
    use_cpu: bool = False
    reward_workers: int = 2
    reward_timeout: float = 10.0


def slug(model: str) -> str:
    """A model's name as the name of a directory."""
    name = re.sub(r"[^\w.-]+", "-", model).strip("-.") or "model"
    return (
        name
        if len(name) <= SLUG_LENGTH
        else f"{name[-SLUG_LENGTH:].strip('-.')}-{sha256(name.encode()).hexdigest()[:8]}"
    )


def slugs(models: Sequence[str]) -> list[str]:
    """The directory of each model. SettingError where two have the same."""
    names = [slug(model) for model in models]
    for i, name in enumerate(names):
        if name in names[:i]:
            first = models[names.index(name)]
            raise SettingError(f"--model: {first} and {models[i]} would both be written to {name}")
    return names


def evaluate_model(name: str, options: Options, around: Around, ranks: Ranks) -> Results | None:
    """Evaluate, or go on where a killed evaluation stopped. The results on the first rank, None on the others."""
    start = time.monotonic()
    folder = around.output_dir / slug(name)
    path = model_path(name)
    source = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    data = load_rows(options, model_type_of(path, **source))
    samples = data.samples
    model: Any = load_model(path, dtype=getattr(torch, options.dtype), **source)
    model.to(device(around.use_cpu)).eval()
    what = identity(name, path, model, options, data)
    files = RecordFiles(folder, len(samples), options.batch_size)
    if ranks.is_first:
        begin(folder, what)
        files.gather()
    ranks.barrier()  # before anyone reads or writes
    done = files.done()
    ranks.barrier()  # all have seen the same
    decoder = Decoder(
        model,
        load_processor(path, **source),
        max_completion_length=options.tokens,
        box_coordinates=options.box_coordinates,
        with_boxes=_has_boxes(options, samples),
        engine=options.rollout_engine,
    )
    with use(options.kernels):
        decoded = _decode(decoder, samples, files, done, ranks)
    ranks.barrier()  # for the last batch of each
    if not ranks.is_first:
        return None
    records = list(files.gather().values())
    scored = _score(options, around, samples, records)
    results = write_results(folder, what, scored)
    title = f"{name}: {options.task}, {len(samples)} rows"
    write_cases(folder / PAGE, title=title, rows=results.table(), cases=scored.cases, count=around.pictures)
    _write_run(folder, start, decoded, ranks)
    return results


def _decode(
    decoder: Decoder, samples: Sequence[Sample], files: RecordFiles, done: dict[int, Record], ranks: Ranks
) -> int:
    """This rank's share of the missing batches; the number of rows that it decoded."""
    for row, record in done.items():
        if record.source != samples[row].source:
            raise UserError(f"{files.path}: row {row} is {record.source}, the data has {samples[row].source} there")
    mine = files.missing(done)[ranks.rank :: ranks.count]
    rows = sum(map(len, mine))
    shown = tqdm(total=rows, desc="decoding", unit="row", file=sys.stderr, disable=None if ranks.is_first else True)
    with shown as bar:
        for batch in mine:
            ranks.look()
            append(files.part(ranks.rank, ranks.count), decoder([samples[row] for row in batch], batch))
            bar.update(len(batch))
    return rows


def _has_boxes(options: Options, samples: Sequence[Sample]) -> bool:
    if options.task != "vqa":
        return True
    rewards = options.rewards()
    return any(method_of(sample, rewards) == CLICK for sample in samples)


def _score(options: Options, around: Around, samples: Sequence[Sample], records: Sequence[Record]) -> Scored:
    if options.task != "vqa":
        return score_task(options.task, samples, records)
    workers = around.reward_workers
    pool = RewardPool(workers, around.reward_timeout) if workers else None
    try:
        return score_task(options.task, samples, records, rewards=options.rewards(), pool=pool)
    finally:
        if pool is not None:
            pool.close()


def _write_run(folder: Path, start: float, decoded: int, ranks: Ranks) -> None:
    """When, where and how: what differs between two runs of the same evaluation."""
    run = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "host": socket.gethostname(),
        "processes": ranks.count,
        "rows_decoded_by_the_first_process": decoded,
        "command": sys.argv,
        "folder": str(folder.absolute()),
        "results": RESULTS,
    }
    (folder / RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
