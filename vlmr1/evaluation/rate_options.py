"""Settings of a run that determine the ratings of `vlmr1 data rate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vlmr1.data.settings import DataSettings
from vlmr1.errors import SettingError
from vlmr1.evaluation.rows import file_digests
from vlmr1.models.settings import ModelSettings
from vlmr1.rewards.settings import RewardOptions
from vlmr1.rollout.settings import RolloutSettings

# Settings of these packages that determine no completion and no reward.
NO_EFFECT = {"check_images", "val_split_ratio", "rollout_kv_mib", "reward_workers", "reward_timeout"}
NO_EFFECT |= {"rollout_keep_cache"}
NO_EFFECT |= {f"judge_{name}" for name in ("timeout", "retries", "concurrency")}


@dataclass(frozen=True)
class RateOptions:
    """The settings of a run, as the options that determine its ratings."""

    args: Any

    @property
    def revision(self) -> str:
        return self.args.model_revision

    @property
    def data(self) -> list[str]:
        return self.args.data_file_paths

    @property
    def kernels(self) -> str:
        return self.args.kernels

    def written(self) -> dict[str, Any]:
        """All options by name, and the digests of reward files."""
        parts: Any = (ModelSettings, DataSettings, RewardOptions, RolloutSettings)
        names = [each.name for part in parts for each in fields(part) if each.name not in NO_EFFECT]
        values = {name: getattr(self.args, name) for name in (*names, "seed", "bf16", "prompts_per_device")}
        files = [spec.rpartition(":")[0] for spec in self.args.reward_funcs]
        return {"task": "rate", **values, "reward_files": file_digests([f for f in files if f.endswith(".py")])}


def pass_reward_of(reward_funcs: Sequence[str], name: str | None) -> int:
    """Return the place of the reward that decides whether a completion passes: the named one, else accuracy, else the
    only one. SettingError where there is none."""
    known = ", ".join(reward_funcs)
    if name is not None:
        if name not in reward_funcs:
            raise SettingError(f"--pass_reward: {name!r} is not among reward_funcs: {known}")
        return reward_funcs.index(name)
    if len(reward_funcs) > 1 and "accuracy" not in reward_funcs:
        raise SettingError(f"--pass_reward is not set: name the reward that decides, one of {known}")
    return reward_funcs.index("accuracy") if "accuracy" in reward_funcs else 0
