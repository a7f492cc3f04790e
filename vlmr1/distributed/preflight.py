"""Launch checks that need no model. `sharded.py` checks again once the engine is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from vlmr1.distributed.launch import check_processes, launch_name
from vlmr1.distributed.sharded import Sharding, check_fsdp, check_sharded
from vlmr1.errors import SettingError


def check_scale(args: TrainingArguments) -> None:
    """SettingError where the processes do not see each other, or the engine cannot honour a setting."""
    check_processes(args.world_size)
    check_saving(args)
    sharding = planned_sharding(args)
    engine = args.world_size > 1 or args.deepspeed_plugin is not None or launch_name() == "fsdp2"
    check_sharded(args, sharding, engine=engine)


def check_saving(args: TrainingArguments) -> None:
    """SettingError where a checkpoint without optimizer would hold shards."""
    if args.save_only_model and launch_name() == "fsdp2":
        raise SettingError("save_only_model is not supported with fsdp2, whose checkpoints are in shards")
    if args.save_only_model and args.load_best_model_at_end and args.deepspeed_plugin is not None:
        raise SettingError("save_only_model is not supported with load_best_model_at_end and DeepSpeed")


def planned_sharding(args: TrainingArguments) -> Sharding | None:
    """As `sharding_of` the accelerator that these settings and this environment will make."""
    if args.deepspeed_plugin is not None:
        return "zero3" if args.deepspeed_plugin.zero_stage == 3 else None
    if launch_name() != "fsdp2":
        return None
    check_fsdp(int(os.environ.get("FSDP_VERSION", 1)))
    return "fsdp2"


@contextmanager
def undivided(plugin: Any) -> Iterator[None]:
    """In this block models are made whole where accelerate's DeepSpeed `plugin`, if there is one, has ZeRO-3 spread
    them over the ranks: one rank alone can make one."""
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)
