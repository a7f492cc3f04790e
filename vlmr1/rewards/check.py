"""Whether rows can be scored: found before training, and named by file and line."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from vlmr1.errors import DataError, SettingError
from vlmr1.rewards.answer import true_text
from vlmr1.rewards.coordinates import converts
from vlmr1.rewards.score import METHOD, score
from vlmr1.rewards.settings import DEFAULTS, RewardSettings
from vlmr1.rewards.strict.accuracy import METHODS
from vlmr1.types import Sample

TEXT_METHODS = ("default", "math", "all_match", "llm")  # any text will do as their solution
PROBE = '<answer>```json\n[{"bbox_2d": [0, 0, 1, 1], "label": ""}]\n```</answer>'
OPTIONS = {"image_grid_thw": [1, 2, 2], "image_size": [28, 28], "tokenizer": "whitespace"}


def check_accuracy(sample: Sample, settings: RewardSettings = DEFAULTS) -> None:
    """Raises DataError for a row whose method is unknown, whose solution its method cannot score, or whose boxes it
    cannot bring to px of the image."""
    method = sample.columns.get(METHOD) or settings.accu_reward_method
    if method == "llm" and settings.judge is None:
        raise SettingError(f"{sample.source}: accu_reward_method llm needs a judge: set judge_url and judge_model")
    if settings.mode == "strict" and method not in (*METHODS, "llm"):
        near = get_close_matches(str(method), [*METHODS, "llm"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise DataError(
            f"{sample.source}: accu_reward_method {method!r} is unknown{hint} Known: {', '.join(METHODS)}, llm"
        )
    if method in TEXT_METHODS:
        if settings.mode == "strict" and not true_text(sample.solution):
            raise DataError(f"{sample.source}: the solution is empty")
        return
    _probe("accuracy", sample, settings, method)
    if converts("accuracy", method):
        settings.boxes.check(sample)


def check_length(sample: Sample, settings: RewardSettings = DEFAULTS) -> None:
    """As `check_accuracy`, which `length` depends on in mode strict; the judge is too dear for it."""
    if settings.mode == "vlm_r1":
        _probe("length", sample, settings, "")
        return
    if (sample.columns.get(METHOD) or settings.accu_reward_method) == "llm":
        raise SettingError(f"{sample.source}: the reward length needs an accu_reward_method other than llm")
    check_accuracy(sample, settings)


def check_solution(name: str) -> Callable[..., None]:
    """A check that the solution can be scored by the scorer `name`."""

    def check(sample: Sample, settings: RewardSettings = DEFAULTS) -> None:
        _probe(name, sample, settings, settings.accu_reward_method)
        if converts(name, ""):
            settings.boxes.check(sample)

    return check


def check_lengths(sample: Sample, settings: RewardSettings = DEFAULTS) -> None:
    """Raises SettingError where the setting of the reward overlong is missing."""
    if settings.overlong_cache_length is None or settings.max_completion_length is None:
        raise SettingError("reward_funcs has overlong: it needs overlong_cache_length")


def _probe(name: str, sample: Sample, settings: RewardSettings, method: str) -> None:
    """Score a completion; what it raises is due to the solution."""
    try:
        score(name, PROBE, sample.solution, mode=settings.mode, **OPTIONS | {METHOD: method})
    except Exception as error:  # published rewards raise what comes
        if settings.mode == "strict" and not isinstance(error, ValueError):
            raise
        kind = "" if settings.mode == "strict" else f"{type(error).__name__}: "
        message = "; ".join([f"{kind}{error}", *getattr(error, "__notes__", ())])
        raise DataError(f"{sample.source}: {message}") from error
