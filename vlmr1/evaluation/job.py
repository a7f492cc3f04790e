"""One model on the rows of an evaluation: decode what is missing, score, write the results."""

from __future__ import annotations

import socket
import sys
import time
from contextlib import closing, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlmr1.distributed.ranks import Ranks
from vlmr1.evaluation.decode import Decode, Decoder, decode_missing
from vlmr1.evaluation.fingerprint import as_json, begin, fingerprint
from vlmr1.evaluation.loading import Source
from vlmr1.evaluation.options import Options
from vlmr1.evaluation.outputs import OutputOptions
from vlmr1.evaluation.records import RecordFiles
from vlmr1.evaluation.results import RESULTS, Results, write_page, write_results
from vlmr1.evaluation.rows import Data, load_rows
from vlmr1.evaluation.tasks import score_task, writes_boxes
from vlmr1.rewards.pool import RewardPool
from vlmr1_kernels import use

RUN = "run.json"


def evaluate_model(name: str, options: Options, output: OutputOptions, ranks: Ranks) -> Results | None:
    """Evaluate, or continue an evaluation that was killed. Return the results on the first rank, None on the others."""
    start = time.monotonic()
    folder, source = output.folder(name), Source(name, options)
    data = load_rows(options, source.model_type())
    samples = data.samples
    model = source.model(use_cpu=output.use_cpu)
    inputs = fingerprint(name, source.path, model, options, data)
    files = RecordFiles(folder, len(samples), options.batch_size)
    decoder = Decoder(
        model,
        source.processor(),
        max_completion_length=options.tokens,
        box_coordinates=options.box_coordinates,
        with_boxes=writes_boxes(options.task, samples, options.rewards()),
        engine=options.rollout_engine,
    )
    with use(options.kernels):
        records, decoded = decode_rows(decoder, data, files, inputs, ranks)
    if records is None:
        return None
    workers = output.reward_workers
    with closing(RewardPool(workers, output.reward_timeout)) if workers else nullcontext() as pool:
        scored = score_task(options.task, samples, records, rewards=options.rewards(), pool=pool)
    results = write_results(folder, inputs, scored)
    write_page(folder, results, scored.cases, output.pictures)
    _write_run(folder, start, decoded, ranks)
    return results


def decode_rows(
    decode: Decode, data: Data, files: RecordFiles, inputs: dict[str, Any], ranks: Ranks
) -> tuple[list[Any] | None, int]:
    """Decode the rows that the folder of `files` lacks. Return all records on the first rank, None on the others, and
    the number of rows that this rank decoded. SettingError where the folder was begun with other `inputs`."""
    if ranks.is_first:
        print(*data.samples.describe(), sep="\n", flush=True)
        begin(files.folder, inputs)
        files.gather()
    ranks.barrier()  # before any rank reads or writes
    done = files.done()
    ranks.barrier()  # all have seen the same files
    decoded = decode_missing(decode, data.samples, files, done, ranks)
    ranks.barrier()  # for the last batch of each rank
    return list(files.gather().values()) if ranks.is_first else None, decoded


def _write_run(folder: Path, start: float, decoded: int, ranks: Ranks) -> None:
    """Write time, host and command, which differ between two runs of the same evaluation."""
    run = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - start, 1),
        "host": socket.gethostname(),
        "processes": ranks.world_size,
        "rows_decoded_by_the_first_process": decoded,
        "command": sys.argv,
        "folder": str(folder.absolute()),
        "results": RESULTS,
    }
    (folder / RUN).write_text(as_json(run), encoding="utf-8")
