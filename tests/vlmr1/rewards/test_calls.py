"""TRL's further arguments of reward functions, and functions that are `async`."""

import asyncio
from types import SimpleNamespace

import pytest

from tests.helpers.rewards import group, sample
from vlmr1.errors import RewardError
from vlmr1.rewards.groups import score_groups
from vlmr1.rewards.registry import RewardContext


def test_a_function_gets_what_it_takes_of_the_trainer() -> None:
    context = RewardContext(SimpleNamespace(global_step=7))

    def some(prompts: list, completions: list, completion_ids: list, solution: list, trainer_state, log_metric) -> list:
        log_metric("half", 0.5)
        return [float(trainer_state.global_step)] * len(completions)

    def every(completions: list, log_extra: object, **columns: list) -> list:
        log_extra("text", [completion[0]["content"] for completion in completions])
        assert columns["trainer_state"] is context.trainer_state
        columns["log_metric"]("half", 1.0)
        return [0.0] * len(completions)

    first, second = score_groups(
        [group(sample(1), "a", "b"), group(sample(2), "c", "d")], [some, every], context=context
    )
    assert first.rewards.tolist() == [[7.0, 0.0]] * 2
    assert [completion.logged for completion in second.completions] == [{"text": "c"}, {"text": "d"}]
    assert context.take() == {"half": 0.75} and context.take() == {}


def test_a_column_of_another_length_is_an_error() -> None:
    def short(completions: list, log_extra: object, **_: list) -> list:
        log_extra("text", ["only one"])
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"short.*log_extra\('text'\): 1 values for 2 completions"):
        score_groups([group(sample(1), "a", "b")], [short], context=RewardContext())


def test_async_functions_run_at_the_same_time() -> None:
    """Each waits for the other to begin; one after the other they would wait for ever."""
    begun: list[asyncio.Event] = []

    async def meet(completions: list, own: int) -> list:
        begun.append(asyncio.Event())
        while len(begun) < 2:
            await asyncio.sleep(0)
        return [float(own)] * len(completions)

    async def one(completions: list, **_: list) -> list:
        return await meet(completions, 1)

    async def two(completions: list, **_: list) -> list:
        return await meet(completions, 2)

    (scored,) = score_groups([group(sample(1), "a", "b")], [one, "format", two])
    assert scored.rewards[:, [0, 2]].tolist() == [[1.0, 2.0]] * 2


def test_an_async_function_that_raises_names_the_row() -> None:
    async def fails(completions: list, **_: list) -> list:
        await asyncio.sleep(0)
        return [1 / len(completion[0]["content"]) for completion in completions]

    async def fine(completions: list, **_: list) -> list:
        return [1.0] * len(completions)

    groups = [group(sample(4), "a", "b"), group(sample(9), "c", "")]
    with pytest.raises(RewardError, match=r"fails.*ZeroDivisionError.*data.jsonl:9"):
        score_groups(groups, [fails, fine])
    zeros: list = []
    scored = score_groups(groups, [fails, fine], timed_out=zeros, working={"fails"})
    assert scored[1].rewards.tolist() == [[1.0, 1.0], [0.0, 1.0]] and [each.source for each in zeros] == [
        "data.jsonl:9"
    ]
