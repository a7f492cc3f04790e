"""Numbers of prompts, sequences and updates of a run."""

from __future__ import annotations

import math

from vlmr1.config import GRPOConfig
from vlmr1.distributed.ranks import Ranks
from vlmr1.grpo.buffer import BufferSampler


def describe_schedule(config: GRPOConfig, rows: int) -> str:
    """Prompts, generations, sequences and updates, over all ranks, in words."""
    ranks = config.world_size
    prompts = config.prompts_per_device * ranks
    repeats = config.steps_per_generation * config.num_iterations
    epoch = len(BufferSampler.of(config, range(rows), Ranks(config.process_index, ranks)))
    updates = config.max_steps if config.max_steps >= 0 else math.ceil(config.num_train_epochs * epoch)
    return (
        f"{rows} rows; an update: {prompts} prompts x {config.num_generations} generations = "
        f"{prompts * config.num_generations} sequences on {ranks} device{'s' if ranks > 1 else ''}; "
        f"{'' if repeats == 1 else f'a generation serves {repeats} updates; '}"
        f"{epoch} updates an epoch, {updates} in all ({updates / epoch:.1f} epochs)"
    )
