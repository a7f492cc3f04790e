"""Old names and values of settings, which every source of settings accepts with a note."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)
RENAMED = {"kl": "kl_estimator", "rollout_logp_alarm": "rollout_logp_warn_threshold"}
RENAMED_VALUES = {"reward_mode": {"vlmr1": "vlm_r1"}}  # by setting


def current_name(name: str, *, note: bool = True) -> str:
    """Return a setting's name today."""
    new = RENAMED.get(name, name)
    if note and new != name:
        _note(name, new)
    return new


def current_value(name: str, value: Any, *, note: bool = True) -> Any:
    """Return a setting's value in today's spelling."""
    values = RENAMED_VALUES.get(name, {})
    if not isinstance(value, str) or value not in values:
        return value
    if note:
        _note(f"{name}={value}", f"{name}={values[value]}")
    return values[value]


def current(settings: Mapping[str, Any], *, note: bool = True) -> dict[str, Any]:
    """Return settings with today's names and values; `note`: say so, as they come from the user."""
    named = {current_name(name, note=note): value for name, value in settings.items()}
    return {name: current_value(name, value, note=note) for name, value in named.items()}


@cache  # once a process
def _note(old: str, new: str) -> None:
    logger.warning("%s is now called %s; the old spelling still works", old, new)
