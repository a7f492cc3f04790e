"""Small jobs to plan."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from vlmr1.config import GRPOConfig
from vlmr1.planner.dry_run import DryRun
from vlmr1.planner.job import Job
from vlmr1.planner.known_models import config_named
from vlmr1.tiny import CHECKPOINT

CONFIG = config_named(str(CHECKPOINT))
SETTINGS: dict[str, Any] = {"num_generations": 3, "max_completion_length": 33}
SETTINGS |= {"prompts_per_device": 4, "tokens_per_pack": 512}  # two packs
JOB: dict[str, Any] = {"device": "cuda", "gpus": 1, "zero": 0, "image_tokens": 16, "text_tokens": 40}


def args_of(**settings: Any) -> GRPOConfig:
    """Settings of a run that is planned, never started."""
    return GRPOConfig(use_cpu=True, report_to="none", **{**SETTINGS, **settings})


def job(config: Any = CONFIG, **given: Any) -> Job:
    """A small job, with these settings and fields of a Job in place of its own."""
    fields = {name: given.pop(name, value) for name, value in JOB.items()}
    return Job(args_of(**given), config, **fields)


class Allocated(DryRun):
    """Equal counter over an ordinary run: what its operators allocate."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return out
