"""Warn once where rewards have given no learning signal for many steps, with the likeliest reason."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)
STEPS = 10  # logged steps in a row
MOST = 0.9  # share of completions


class NoSignalWarning(TrainerCallback):
    """Watches the logs; warns once, when in `STEPS` logged steps in a row no group had rewards that differ, or all
    rewards were 0 and nearly no completion could be read."""

    def __init__(self) -> None:
        self.steps = 0
        self.warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.warned or "zero_variance_groups" not in logs:
            return
        self.steps = self.steps + 1 if has_no_signal(logs) else 0
        if self.steps == STEPS:
            self.warned = True
            logger.warning(
                "the rewards gave no learning signal in the last %d logged steps (up to step %d): %s",
                STEPS,
                state.global_step,
                reason(logs),
            )


def has_no_signal(logs: Mapping[str, float]) -> bool:
    """Return whether a logged step has no advantages, or nothing that could be read and no reward."""
    if logs["zero_variance_groups"] == 1:
        return True
    unread = logs.get("parse_failures", 0.0) > MOST
    return unread and all(value == 0 for value in means(logs).values())


def reason(logs: Mapping[str, float]) -> str:
    """The likeliest one, from the numbers of a step."""
    rewards = means(logs)
    scores = ", ".join(f"{name} {value:.3g}" for name, value in rewards.items())
    truncated, unread = logs["truncated"], logs.get("parse_failures", 0.0)
    if truncated > MOST:
        return f"{truncated:.0%} of the completions end at the length limit: raise max_completion_length"
    if unread > MOST:
        return (
            f"{unread:.0%} of the completions have no closed <answer>, and no box where one is read: the prompt has to "
            "ask for one (question_template), or the model has to learn the format first"
        )
    if logs.get("empty_think", 0.0) > MOST:
        return (
            f"{logs['empty_think']:.0%} of the completions have an empty <think> block, for which the reward format is "
            "0: allow_empty_think=true counts them, else the prompt has to ask for a thought"
        )
    if logs.get("box_failures", 0.0) > MOST:
        return (
            f"{logs['box_failures']:.0%} of the answers hold nothing that the accuracy method can read a box from: "
            "see completions.jsonl, and accu_reward_method"
        )
    if logs.get("reward_timeouts", 0.0) > 0:
        return f"{logs['reward_timeouts']:.0f} scores a step were not done in time and are 0: raise reward_timeout"
    if logs.get("reward_errors", 0.0) > 0:
        return f"for {logs['reward_errors']:.0f} scores a step a reward function raised, and they are 0: see the log"
    if 0 <= logs.get("entropy", 1.0) < 0.01:
        return f"the completions of a group are the same (entropy {logs['entropy']:.4f}): raise the temperature"
    if rewards and all(value == 0 for value in rewards.values()):
        return f"answers are read and all score 0 ({scores}): do solutions, box coordinates and reward_funcs fit?"
    return f"every completion of a prompt has the same score ({scores}): the task is too easy or too hard"


def means(logs: Mapping[str, float]) -> dict[str, float]:
    """The mean of each reward, by its name."""
    found = {key: value for key, value in logs.items() if key.startswith("rewards/") and key.endswith("/mean")}
    return {key.removeprefix("rewards/").removesuffix("/mean"): value for key, value in found.items()}
