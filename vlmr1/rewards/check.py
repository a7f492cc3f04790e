"""Checks before training that a row can be scored; errors name its file and line."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from vlmr1.errors import DataError, SettingError
from vlmr1.rewards.answer import labelled_boxes, true_text
from vlmr1.rewards.methods import CONVERTED, METHOD, WRITTEN_BOXES, converts, method_of
from vlmr1.rewards.score import score
from vlmr1.rewards.settings import DEFAULTS, RewardSettings
from vlmr1.rewards.strict.accuracy import METHODS
from vlmr1.types import Sample

TEXT_METHODS = ("default", "math", "all_match", "llm")  # any text is a valid solution
PROBE = '<answer>```json\n[{"bbox_2d": [0, 0, 1, 1], "label": ""}]\n```</answer>'
OPTIONS = {"image_grid_thw": [1, 2, 2], "image_size": [28, 28], "tokenizer": "whitespace"}


def check_accuracy(sample: Sample, settings: RewardSettings = DEFAULTS) -> None:
    """Raise DataError where the method is unknown, cannot score the solution, or cannot convert boxes to pixels."""
    method = method_of(sample, settings)
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
    check_true_boxes(method, sample, settings)
    _probe("accuracy", sample, settings, method)
    if converts("accuracy", method):
        settings.boxes.check(sample)


def check_length(sample: Sample, settings: RewardSettings = DEFAULTS) -> None:
    """Check as `check_accuracy`, which `length` depends on in mode strict; the method llm is refused."""
    if settings.mode == "vlm_r1":
        _probe("length", sample, settings, "")
        return
    if method_of(sample, settings) == "llm":
        raise SettingError(f"{sample.source}: the reward length needs an accu_reward_method other than llm")
    check_accuracy(sample, settings)


def check_solution(name: str) -> Callable[..., None]:
    """Return a check that the scorer `name` can score the solution."""

    def check(sample: Sample, settings: RewardSettings = DEFAULTS) -> None:
        check_true_boxes(name, sample, settings)
        _probe(name, sample, settings, settings.accu_reward_method)
        if converts(name, ""):
            settings.boxes.check(sample)

    return check


def check_lengths(sample: Sample, settings: RewardSettings = DEFAULTS) -> None:
    """Raise SettingError where the reward overlong lacks its setting."""
    if settings.overlong_cache_length is None or settings.max_completion_length is None:
        raise SettingError("reward_funcs has overlong: it needs overlong_cache_length")


def check_true_boxes(method: str, sample: Sample, settings: RewardSettings) -> None:
    """Raise DataError for a box of the solution that the method reads and that cannot be one in its coordinates."""
    if settings.mode == "strict" and method in (*CONVERTED, *WRITTEN_BOXES):
        boxes = [box for _, box in labelled_boxes(true_text(sample.solution)) or () if box is not None]
        settings.boxes.check_truth(sample, boxes, converted=method in (*CONVERTED, "iou_qwen"))


def check_box_of_image(sample: Sample, settings: RewardSettings = DEFAULTS) -> None:
    """Check as `check_true_boxes` by the row's method, where the row has an image; for a check without rewards."""
    if sample.images:
        check_true_boxes(method_of(sample, settings), sample, settings)


def _probe(name: str, sample: Sample, settings: RewardSettings, method: str) -> None:
    """Score a valid completion: an exception then is due to the solution, and becomes a DataError."""
    try:
        score(name, PROBE, sample.solution, mode=settings.mode, **OPTIONS | {METHOD: method})
    except Exception as error:  # published rewards raise many types
        if settings.mode == "strict" and not isinstance(error, ValueError):
            raise
        kind = "" if settings.mode == "strict" else f"{type(error).__name__}: "
        message = "; ".join([f"{kind}{error}", *getattr(error, "__notes__", ())])
        raise DataError(f"{sample.source}: {message}") from error
