"""Score one completion by the name of a reward."""

from __future__ import annotations

from typing import Any

from vlmr1.errors import SettingError
from vlmr1.lifecycle.renamed import current_value
from vlmr1.rewards.answer import find_answer, true_text
from vlmr1.rewards.judge import JudgeError
from vlmr1.rewards.methods import METHOD
from vlmr1.rewards.settings import MODES
from vlmr1.rewards.strict import SCORERS as STRICT
from vlmr1.rewards.vlm_r1 import SCORERS as PUBLISHED
from vlmr1.rewards.vlm_r1.tags import last_answer, true_answer

# A reward that VLM-R1 does not have is the strict one in both modes.
SCORERS = {"strict": STRICT, "vlm_r1": STRICT | PUBLISHED}


def score(reward: str, content: str, solution: str, *, mode: str = "strict", **kwargs: Any) -> float:
    """Return the score of one completion's text.

    Args:
        reward: accuracy, format, format_rec_{qwen,internvl,glm}, iou, iou_{qwen,internvl,glm}, length, repetition,
            counting, point_in_box.
        mode: "vlm_r1" computes what VLM-R1 published, faults and exceptions included; "strict" has them corrected.
        kwargs: `accu_reward_method` (accuracy; default "iou"), `image_grid_thw` and `image_size` (iou_qwen),
            `tokenizer` (length), `judge` (the method llm), `box_scale` (mode strict: factors (sx, sy) from the
            completion's boxes and points to px of the image file, default 1), `think_opening` (mode strict: the
            `<think>` with which the prompt ends), `allow_empty_think` (mode strict: format). Others are ignored: a row
            may have any columns.

    SettingError for an unknown name or mode; a reward raises ValueError for a solution that it cannot score.
    """
    mode = current_value("reward_mode", mode)
    if mode not in MODES:
        raise SettingError(f"reward_mode is {mode!r}: one of {', '.join(MODES)}")
    if reward not in SCORERS[mode]:
        raise SettingError(f"unknown reward {reward!r}; known: {', '.join(SCORERS[mode])}")
    if mode == "strict":
        content = (kwargs.get("think_opening") or "") + content
    if reward == "accuracy":
        kwargs.setdefault(METHOD, "iou")
        if kwargs[METHOD] == "llm":
            return judged([(content, solution)], kwargs.get("judge"), mode=mode)[0]
    return float(SCORERS[mode][reward](content, solution, **kwargs))


def judged(rows: list[tuple[str, str]], judge: Any, *, mode: str) -> list[float]:
    """Return the judge's scores of (completion, solution) rows; in mode strict a completion without an answer scores 0.

    SettingError without a judge, JudgeError where it fails.
    """
    if judge is None:
        raise SettingError("accu_reward_method llm needs a judge: set judge_url and judge_model")
    if mode == "vlm_r1":
        return judge.scores([(last_answer(content), true_answer(solution)) for content, solution in rows])
    asked = {i: (find_answer(content), true_text(solution)) for i, (content, solution) in enumerate(rows)}
    asked = {i: pair for i, pair in asked.items() if pair[0]}
    places = list(asked)
    try:
        values = dict(zip(places, judge.scores(list(asked.values())), strict=True))
    except JudgeError as error:
        error.index = places[error.index]
        raise
    return [values.get(i, 0.0) for i in range(len(rows))]
