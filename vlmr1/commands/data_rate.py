"""`vlmr1 data rate`: pass rate and mean reward of each row by a model, resumable, for `min_pass_rate` of training."""

from __future__ import annotations

import argparse
import math
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmr1.commands.arguments import parse_config
from vlmr1.commands.evaluate import table
from vlmr1.commands.prepare import prepare
from vlmr1.data.pass_rates import PASS_RATE, PassRates
from vlmr1.distributed.ranks import Ranks
from vlmr1.errors import SettingError
from vlmr1.evaluation.outputs import OutputOptions
from vlmr1.evaluation.rate_job import rate
from vlmr1.evaluation.rate_options import pass_reward_of
from vlmr1.evaluation.rated import rate_rows, write_rows
from vlmr1.evaluation.results import PAGE, write_page, write_results
from vlmr1.lifecycle.disk import check_output_dir
from vlmr1.report.pass_rates import histogram

# Settings of a run that do not apply: every row is rated, and nothing is evaluated.
REPLACED = {"streaming": False, "val_split_ratio": 0.0, "eval_steps": None, "eval_on_start": False}
BETWEEN = 0.01, 0.99  # bounds that the last line of the output suggests


def run(options: argparse.Namespace, rest: list[str]) -> None:
    config = parse_config(rest, recipe=options.recipe, config=options.config)
    deciding = pass_reward_of(config.reward_funcs, options.pass_reward)
    if not math.isfinite(options.pass_threshold):
        raise SettingError(f"--pass_threshold is {options.pass_threshold}: it must be a number")
    folder = OutputOptions(options.output_dir, options.pictures).folder(config.model_name_or_path or "")
    for name, value in {**REPLACED, "output_dir": str(folder)}.items():
        setattr(config, name, value)
    config.check_device()
    ranks = Ranks(config.process_index, config.world_size)
    if ranks.is_first:
        check_output_dir(folder)
    prepared = prepare(config, finished=True)
    rows: Any = prepared.train
    rater, records, inputs = rate(prepared.model, prepared.processor, rows, config, folder, ranks)
    if records is not None:
        rule = {"reward": config.reward_funcs[deciding], "threshold": options.pass_threshold}
        scored, columns = rate_rows(rater.samples, records, rater.weights, deciding, options.pass_threshold)
        paths = write_rows(rater.samples, folder, columns)
        results = write_results(folder, {**inputs, "pass": rule}, scored)
        bars = histogram(PassRates(None, None, Counter(columns[PASS_RATE])))
        write_page(folder, results, scored.cases, options.pictures, bars)
        print(f"{table(results)}\nrows     {', '.join(map(str, paths))}\nreport   {folder / PAGE}")
        print(f"to train on the rows that pass at times: {_training(paths)}", flush=True)
    ranks.barrier()  # a failure of the first rank ends all


def _training(paths: Mapping[Path, Path | None]) -> str:
    """Return the settings of a run on the rated rows."""
    folders = [folder for folder in paths.values() if folder is not None]
    named = {"data_file_paths": list(paths), "image_folders": folders[:1] if len(set(folders)) == 1 else folders}
    words = [word for name, values in named.items() if values for word in (f"--{name}", *map(str, values))]
    low, high = BETWEEN
    return f"{shlex.join(words)} --min_pass_rate {low} --max_pass_rate {high}"
