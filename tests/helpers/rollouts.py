"""Prompts and engines for rollouts of the tiny model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.maker import Maker
from vlmr1.data.images import open_image
from vlmr1.models import family_of
from vlmr1.rollout import NativeEngine, SamplingSettings, decode_state, graphs, scheduler
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


def prompts_of(make: Maker, *names: str) -> list[Prompt]:
    return [make.prompt(text, sizes) for name in names for text, sizes in CASES[name]]


def engine(model: Any, processor: Any, kind: Callable = NativeEngine) -> Any:
    return kind(model, family_of(model), processor.tokenizer)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def completions(groups: list[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def tokens(groups: list[Group]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions(groups)]


def stock_inputs(processor: Any, prompt: Prompt) -> Any:
    """What the library's processor makes of a prompt."""
    text = processor.apply_chat_template(prompt.sample.messages, tokenize=False, add_generation_prompt=True)
    images = [open_image(path, "") for path in prompt.sample.images]
    return processor(text=[text], images=images or None, return_tensors="pt")


def generated(model: Any, processor: Any, prompt: Prompt, length: int, **options: Any) -> tuple[Any, Tensor, Tensor]:
    """Tokens, their log-probs, and those of what they are drawn from, by the library's own processor and `generate`:
    one prompt, no padding."""
    inputs = stock_inputs(processor, prompt)
    options |= {"max_new_tokens": length, "do_sample": False, "return_dict_in_generate": True}
    options |= {"suppress_tokens": family_of(model).placeholder_ids(model, processor.tokenizer)}
    drawn = model.generate(**inputs, **options, output_logits=True, output_scores=True)
    ids = drawn.sequences[0, inputs["input_ids"].shape[1] :]
    logp, sampling_logp = (
        torch.cat(values).log_softmax(-1).gather(-1, ids[:, None])[:, 0] for values in (drawn.logits, drawn.scores)
    )
    return ids.tolist(), logp, sampling_logp


class StubGraph:
    """In place of a CUDA graph: a step on the tensors of one batch. `moving` are tensors whose addresses it has baked
    in: it must not be replayed after they have moved."""

    def __init__(self, step: Callable, batch: Any, capacity: graphs.Capacity, pool: Any):
        self.step, self.batch, self.capacity = step, batch, capacity
        state = [tensor.clone() for tensor in graphs.mutated_tensors(batch)]
        step(batch, torch.zeros(batch.rows, dtype=torch.float64))  # as a warm-up does
        for tensor, before in zip(graphs.mutated_tensors(batch), state, strict=True):
            tensor.copy_(before)
        self.baked = self._addresses()

    def _addresses(self) -> list[int]:
        schedule = self.step.__self__  # type: ignore[attr-defined]
        read = [schedule.cache.data, schedule.suppressed_ids, *schedule.model.parameters()]
        copies = () if schedule.engine.decode_forward is None else schedule.engine.decode_forward.addresses
        return [*copies, *(each.data_ptr() for each in (*read, schedule.half_weight) if each is not None)]

    def __call__(self, batch: Any, draws: Tensor) -> Any:
        assert batch is self.batch and len(draws) == batch.rows
        assert self._addresses() == self.baked
        return self.step(batch, draws)


def with_stub_graphs(monkeypatch: pytest.MonkeyPatch) -> list[graphs.Capacity]:
    """Decode by stub graphs, with 16 steps between two checks; returns the list of what is captured."""
    captured: list[graphs.Capacity] = []

    class Counted(StubGraph):
        def __init__(self, step: Callable, batch: Any, capacity: graphs.Capacity, pool: Any):
            captured.append(capacity)
            super().__init__(step, batch, capacity, pool)

    monkeypatch.setattr(scheduler, "DecodeGraph", Counted)
    monkeypatch.setattr(scheduler, "STEPS_PER_CHECK", {"cpu": 16})
    monkeypatch.setattr(decode_state, "new_pool", lambda: None)
    monkeypatch.setattr(NativeEngine, "_graphs", lambda self, request: True)
    return captured


@contextmanager
def changed_logits(model: Any, change: Callable[[int, Tensor], None]) -> Iterator[None]:
    """`change(call, logits)` edits the head's output in place; call 0 is the prefill's."""
    calls = iter(range(10**6))
    handle = model.lm_head.register_forward_hook(lambda _, __, logits: change(next(calls), logits))
    try:
        yield
    finally:
        handle.remove()
