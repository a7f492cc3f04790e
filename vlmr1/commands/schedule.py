"""Numbers of prompts, sequences and updates of a run."""

from __future__ import annotations

import math
from typing import Any

from vlmr1.distributed.ranks import Ranks
from vlmr1.grpo.buffer import BufferSampler


def describe_schedule(config: Any, rows: int | None) -> str:
    """Prompts, generations, sequences and updates, over all ranks, in words. `rows` is None for a stream."""
    ranks = config.world_size
    prompts = config.prompts_per_device * ranks
    repeats = config.updates_per_generation * config.num_iterations
    if rows is None:
        total = f"{config.max_steps} updates in all"
    else:
        sampler = BufferSampler.of(config, range(rows), Ranks(config.process_index, ranks))
        epoch = len(sampler)
        updates = config.max_steps if config.max_steps >= 0 else math.ceil(config.num_train_epochs * epoch)
        total = f"{epoch} updates an epoch, {updates} in all ({updates / epoch:.1f} epochs)"
        if sampler.unused:
            plural = "s are" if sampler.unused > 1 else " is"
            why = f"an update needs {sampler.least}"
            if sampler.drop_last:
                why = f"a generation has {sampler.batch_size}, and dataloader_drop_last is set"
            total += f"; {sampler.unused} row{plural} left over at the end of an epoch: {why}"
    group = getattr(config, "num_generations", None)  # supervised fine-tuning has the answers of the rows
    drawn = "" if group is None else f" x {group} generations = {prompts * group} sequences"
    return (
        f"{'streamed' if rows is None else rows} rows; "
        f"an update: {prompts} prompts{drawn} on {ranks} device{'s' if ranks > 1 else ''}; "
        f"{'' if repeats == 1 else f'a generation serves {repeats} updates; '}"
        f"{total}"
    )
