"""Old names and values of settings, and those of TRL and VLM-R1, which every source of settings accepts with a note."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)
RENAMED = {
    "kl": "kl_estimator",
    "rollout_logp_alarm": "rollout_logp_warn_threshold",
    "dtype": "model_dtype",
    "torch_dtype": "model_dtype",
    "freeze_vision_modules": "freeze_vision",
    "image_root": "image_folders",
    "reward_method": "accu_reward_method",
}
RENAMED_VALUES = {  # by setting
    "reward_mode": {"vlmr1": "vlm_r1"},
    "log_completions": {"true": 4, "false": 0},
    "scale_rewards": {"true": "group", "false": "none"},
}


def current_name(name: str, *, note: bool = True) -> str:
    """Return a setting's name today."""
    new = RENAMED.get(name, name)
    if note and new != name:
        note_spelling(name, new)
    return new


def current_value(name: str, value: Any, *, note: bool = True) -> Any:
    """Return a setting's value in today's spelling."""
    now = RENAMED_VALUES.get(name, {}).get(str(value).lower())
    if now is None:
        return value
    if note:
        note_spelling(f"{name}={value}", f"{name}={now}")
    return now


def current(settings: Mapping[str, Any], *, note: bool = True) -> dict[str, Any]:
    """Return settings with today's names and values; `note`: say so, as they come from the user."""
    named = {current_name(name, note=note): value for name, value in settings.items()}
    return {name: current_value(name, value, note=note) for name, value in named.items()}


@cache  # once a process
def note_spelling(given: str, meaning: str) -> None:
    """Say how a setting was read; with several processes once."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s is read as %s", given, meaning)
