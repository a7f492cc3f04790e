"""One model on the rows of a run: rate those that the output directory lacks."""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from vlmr1.data.samples import Samples
from vlmr1.distributed.ranks import Ranks
from vlmr1.evaluation.fingerprint import fingerprint
from vlmr1.evaluation.job import decode_rows
from vlmr1.evaluation.rate import RatedRow, Rater
from vlmr1.evaluation.rate_options import RateOptions
from vlmr1.evaluation.records import RecordFiles
from vlmr1.evaluation.rows import Data
from vlmr1.grpo.setup import make_reward_pool
from vlmr1.tiny import model_path
from vlmr1_kernels import use


def rate(
    model: Any, processor: Any, samples: Samples, args: Any, folder: Path, ranks: Ranks
) -> tuple[Rater, list[RatedRow] | None, dict[str, Any]]:
    """Rate, or continue a rating that was killed. Return the rater, which knows the rows, their records, and the
    fingerprint of the rating; on other ranks than the first None and {} for the latter two."""
    pool = make_reward_pool(args)
    with closing(pool) if pool else nullcontext(), use(args.kernels):
        rater = Rater(model, processor, samples, args, pool)
        if not getattr(model, "is_loaded_in_4bit", False):  # such a model is where it was loaded
            model.to(args.device)
        data, inputs = Data(rater.samples, ""), {}
        if ranks.is_first:
            data, name = Data.of(rater.samples), args.model_name_or_path
            inputs = fingerprint(name, model_path(name), model, RateOptions(args), data)
        files = RecordFiles(folder, len(rater.samples), args.prompts_per_device, RatedRow)
        if files.done():  # of an earlier start: every function has scored
            rater.working = {reward.name for reward in rater.rewards}
        records, _ = decode_rows(rater, data, files, inputs, ranks)
    return rater, records, inputs
