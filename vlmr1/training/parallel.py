"""Distribution of a run over processes: ranks, the engine that shards, and their needs of settings and model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlmr1.distributed.launch import check_launched
from vlmr1.distributed.ranks import Ranks
from vlmr1.distributed.sharded import (
    Sharding,
    check_sharded,
    round_zero2_weights,
    set_fsdp_mixed_precision,
    sharding_of,
)


@dataclass(frozen=True)
class Parallel:
    """The processes of a run."""

    accelerator: Any
    ranks: Ranks
    sharding: Sharding | None

    @property
    def has_engine(self) -> bool:
        """Return whether DeepSpeed or FSDP runs the model: they synchronize gradients themselves."""
        state = self.accelerator.state
        return any(getattr(state, name, None) is not None for name in ("deepspeed_plugin", "fsdp_plugin"))

    @property
    def in_lockstep(self) -> bool:
        """Return whether every pass has to call every module on all ranks: DDP and engines count on gradients of every
        parameter."""
        return self.ranks.world_size > 1 or self.has_engine


def make_parallel(args: Any, accelerator: Any, model: Any) -> Parallel:
    """Return the distribution of this run. SettingError where the launch or a setting does not allow it. The model
    is rounded where the engine would do so later."""
    ranks = Ranks(args.process_index, args.world_size)
    check_launched(ranks.world_size, accelerator)
    parallel = Parallel(accelerator, ranks, sharding_of(accelerator))
    check_sharded(args, parallel.sharding, engine=parallel.in_lockstep)
    set_fsdp_mixed_precision(accelerator, parallel.sharding)
    round_zero2_weights(model, accelerator, bf16=args.bf16)
    return parallel
