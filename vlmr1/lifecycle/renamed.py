"""Old names and values of settings, which every source of settings accepts with a note."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)
RENAMED = {"kl": "kl_estimator", "rollout_logp_alarm": "rollout_logp_warn_threshold"}
RENAMED_VALUES = {"reward_mode": {"vlmr1": "vlm_r1"}}  # by setting


def current_name(name: str) -> str:
    """A setting's name today."""
    new = RENAMED.get(name, name)
    if new != name:
        _note(name, new)
    return new


def current_value(name: str, value: Any) -> Any:
    """A setting's value in today's words."""
    values = RENAMED_VALUES.get(name, {})
    if isinstance(value, str) and value in values:
        _note(f"{name}={value}", f"{name}={values[value]}")
        return values[value]
    return value


def current(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with today's names and values."""
    return {current_name(name): current_value(current_name(name), value) for name, value in settings.items()}


@cache  # once a process
def _note(old: str, new: str) -> None:
    logger.warning("%s is now called %s; the old spelling still works", old, new)
