"""Prompts and engines for rollouts of the tiny model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.helpers.maker import Maker
from vlmr1.models import family_of
from vlmr1.rollout import NativeEngine, SamplingSettings
from vlmr1.types import Completion, Group, Prompt

GREEDY = SamplingSettings(20, greedy=True)


CASES = {
    "one_image": [("Locate the digit 7.", (112,))],
    "two_images": [("Which of the two has a 4?", (56, 112))],
    "text_beside_images": [
        ("Locate the digit 1.", (84,)),
        ("What is seven?", ()),
        ("Locate the digit 2.", (112,)),
    ],
    "text_only": [("What is seven?", ())],
    "mixed_lengths": [
        ("Locate the digit 7.", (140,)),
        ("Where, if anywhere at all on this canvas, is the digit 3?", (56,)),
        ("Where?", (84, 56)),
    ],
}


def prompts_of(make: Maker, name: str) -> list[Prompt]:
    return [make.prompt(text, sizes) for text, sizes in CASES[name]]


def engine(model: Any, processor: Any, kind: Callable = NativeEngine) -> Any:
    return kind(model, family_of(model), processor.tokenizer)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def completions(groups: list[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def tokens(groups: list[Group]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions(groups)]


@contextmanager
def changed_logits(model: Any, change: Callable[[int, Tensor], None]) -> Iterator[None]:
    """`change(call, logits)` edits the head's output in place; call 0 is the prefill's."""
    calls = iter(range(10**6))
    handle = model.lm_head.register_forward_hook(lambda _, __, logits: change(next(calls), logits))
    try:
        yield
    finally:
        handle.remove()
