"""Which accuracy method a data file has; a row's own column wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmr1.errors import SettingError
from vlmr1.rewards.score import METHOD


def columns_of_files(count: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """The column `accu_reward_method` of the rows of each of `count` data files that have none of their own; none for
    one method, which is the setting of the rewards. SettingError for another number of methods.
    """
    if len(methods) == 1:
        return []
    if len(methods) != count:
        raise SettingError(
            f"accu_reward_method has {len(methods)} methods for {count} data files: give one for all, or one for each"
        )
    return [{METHOD: method} for method in methods]
