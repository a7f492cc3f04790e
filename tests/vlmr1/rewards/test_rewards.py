"""Rewards, the registry and the scoring of groups."""

import math
from dataclasses import replace

import pytest
import torch

from tests.helpers.rewards import answered, group, sample
from vlmr1.data.boxes import iou
from vlmr1.data.samples import check_rows
from vlmr1.errors import DataError, RewardError, SettingError
from vlmr1.rewards import Reward, check_samples, get_reward, register, score_groups
from vlmr1.rewards.answer import has_format
from vlmr1.rewards.registry import REWARDS, checks_of


def score_one(function, *texts, row=None):
    """Rewards [G, 1] of the completions of one row."""
    return score_groups([group(row or sample(), *texts)], [function])[0].rewards


@pytest.mark.parametrize(
    "box, expected",
    [
        pytest.param((0, 0, 10, 10), 1.0, id="equal"),
        pytest.param((5, 0, 15, 10), 50 / 150, id="half"),
        pytest.param((2.5, 2.5, 7.5, 7.5), 0.25, id="inside"),
        pytest.param((-10, -10, 10, 10), 0.25, id="negative"),
        pytest.param((10, 0, 20, 10), 0.0, id="touching"),
        pytest.param((5, 5, 5, 8), 0.0, id="no-width"),
        pytest.param((10, 10, 0, 0), 0.0, id="inverted-both"),
        pytest.param((10, 0, 0, 10), 0.0, id="inverted"),
        pytest.param((0, 0, 1e308, 1e308), 0.0, id="area-overflows"),
    ],
)
def test_iou(box, expected):
    assert iou(box, (0, 0, 10, 10)) == pytest.approx(expected, abs=1e-12)
    assert iou((0, 0, 10, 10), box) == pytest.approx(expected, abs=1e-12)


def test_accuracy():
    texts = [
        answered("[5, 0, 15, 10]"),
        answered("seven"),
        "<think>[0, 0, 10, 10]",
        answered("[0,0,9,9]") + answered("[0,0,10,10]"),
    ]
    assert score_one("accuracy", *texts)[:, 0].tolist() == pytest.approx([1 / 3, 0, 0, 1])


def test_the_best_of_several_solutions():
    """A built-in reward counts for the best solution; the user's own function gets them all."""
    row = replace(sample(), solution="[0, 0, 10, 10]", other_solutions=("[5, 0, 15, 10]", "[0, 0, 20, 10]"))
    texts = [answered("[5, 0, 15, 10]"), answered("[0, 0, 20, 10]"), answered("[0, 0, 5, 10]"), "none"]
    seen = []

    def mine(solution, **columns):
        seen.extend(solution)
        return [float(len(each)) for each in solution]

    groups = [group(row, *texts), group(sample(), *texts)]
    several, one = (scored.rewards.T.tolist() for scored in score_groups(groups, ["accuracy", "format", mine]))
    assert several[0] == pytest.approx([1, 1, 0.5, 0])
    assert several[1] == one[1]
    assert one[0] == score_one("accuracy", *texts)[:, 0].tolist()
    assert several[2] == [3.0] * 4 and seen[0] == [row.solution, *row.other_solutions]


def test_every_accepted_solution_is_checked():
    row = replace(sample(), other_solutions=("no box",))
    with pytest.raises(DataError, match="no box"):
        check_rows([row], checks_of(["accuracy"]), images=False)


def test_parsing_is_linear():
    """200,000 characters of tags take milliseconds; a backtracking parser would take minutes."""
    texts = ["<answer>" * 25_000, "</think><answer>" * 12_500, "</answer>" * 22_000, "<think>" + " " * 200_000]
    texts += [
        part * (200_000 // len(part))
        for part in ("<box>", "[", "[ ", "{", '{"', "(1", "(1,2),", "<ref>", "[1", "```", "[x")
    ]
    for text in [*texts, "(1" + " " * 200_000, "(" + "1" * 200_000]:
        assert score_one("accuracy", text).item() == 0
        assert not has_format(text)


def test_own_rewards(tmp_path, monkeypatch):
    code = "def one(prompts, completions, **columns):\n    return [1.0] * len(completions)\nNUMBER = 3\n"
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{tmp_path}/my_rewards.py:one", "my_rewards:one"):
        assert get_reward(name).name == name
        assert score_one(name, "a", "b").tolist() == [[1.0], [1.0]]
    assert get_reward(f"{tmp_path}/my_rewards.py:one") is get_reward(f"{tmp_path}/my_rewards.py:one")
    (tmp_path / "broken.py").write_text("def one(:\n")
    for name, expected in [
        ("my_rewards:two", "my_rewards has no 'two'"),
        ("my_rewards:NUMBER", "my_rewards:NUMBER is not a function but int"),
        ("no_such_module:one", "cannot import no_such_module"),
        (f"{tmp_path}/none.py:one", "No such file"),
        (f"{tmp_path}/broken.py:one", "invalid syntax"),
        (":one", "cannot import"),
    ]:
        with pytest.raises(SettingError) as caught:
            get_reward(name)
        assert str(caught.value).startswith(f"reward_funcs: {name}") and expected in str(caught.value)


def test_register(monkeypatch):
    monkeypatch.setattr("vlmr1.rewards.registry.REWARDS", dict(REWARDS))

    @register("two")
    def two(prompts, completions, **columns):
        return [2] * len(completions)

    assert score_one("two", "a").tolist() == [[2.0]]
    assert get_reward(two).name == "two"
    with pytest.raises(ValueError, match="a reward called 'two' is registered already"):
        register("two")(two)


def test_own_function_with_check():
    def own(prompts, completions, **columns):
        return [0.0] * len(completions)

    seen = []
    own.check = lambda row: seen.append(row.source)
    check_samples([own], [sample(1), sample(2)])
    assert seen == ["data.jsonl:1", "data.jsonl:2"]


def test_scoring_calls_each_function_once_with_aligned_columns():
    calls = []

    def lengths(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [len(completion[0]["content"]) for completion in completions]

    groups = [group(sample(1, "A", id=1, only=0), "x", "xx"), group(sample(2, "B", id=2), "xxx", "")]
    scored = score_groups(groups, [lengths, Reward("half", lambda prompts, **columns: [0.5] * 4)])
    ((prompts, completions, columns),) = calls
    assert [prompt[0]["content"] for prompt in prompts] == ["question 1"] * 2 + ["question 2"] * 2
    assert completions[2] == [{"role": "assistant", "content": "xxx"}]
    assert columns == {
        "id": [1, 1, 2, 2],
        "solution": ["A", "A", "B", "B"],
        "completion_ids": [[3], [3, 3], [3, 3, 3], []],
    }
    assert [g.rewards.tolist() for g in scored] == [[[1, 0.5], [2, 0.5]], [[3, 0.5], [0, 0.5]]]
    assert all(g.rewards.dtype == torch.float32 and g.rewards.is_contiguous() for g in scored)
    assert [g.prompt for g in scored] == [g.prompt for g in groups] and groups[0].rewards is None


def test_groups_may_differ_in_size_and_be_none():
    groups = [group(sample(1), "a"), group(sample(2), *"abc")]
    shapes = [tuple(g.rewards.shape) for g in score_groups(groups, ["accuracy", "format"])]
    assert shapes == [(1, 2), (3, 2)]
    assert score_groups([], ["accuracy"]) == []


@pytest.mark.parametrize(
    "values",
    [torch.tensor([1, 2]), torch.tensor([1.0, 2.0]).numpy(), (1, 2), [torch.tensor(1.0), torch.tensor([2])]],
    ids=["tensor", "numpy", "tuple", "list-of-tensors"],
)
def test_values_of_other_kinds(values):
    assert score_one(lambda **_: values, "a", "b").tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    "bad, shown",
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("1.0", "'1.0'"),
        ([1.0], "[1.0]"),
        (1e39, "1e+39"),
        (torch.tensor(math.nan), "nan"),
    ],
    ids=["nan", "inf", "text", "list", "beyond-float32", "nan-tensor"],
)
def test_a_reward_that_is_not_a_number_names_the_row(bad, shown):
    def strange(prompts, completions, **columns):
        return [bad if completion[0]["content"] == "bad" else 0.0 for completion in completions]

    with pytest.raises(RewardError) as caught:
        score_groups([group(sample(4), "a", "b"), group(sample(9), "c", "bad")], ["format", strange])
    assert str(caught.value) == (
        f"reward strange: returned {shown}, not a finite number, for the row data.jsonl:9 and the completion 'bad'"
    )


def test_none_means_that_the_reward_does_not_apply():
    def some(prompts, completions, **columns):
        return [None if completion[0]["content"] == "bad" else 2.0 for completion in completions]

    (scored,) = score_groups([group(sample(4), "bad", "b")], [some])
    assert scored.rewards.isnan().tolist() == [[True], [False]] and scored.rewards[1].item() == 2.0


def test_a_reward_that_raises_for_the_batch_only():
    def crowded(prompts, completions, **columns):
        if len(prompts) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(RewardError, match=r"for the rows data.jsonl:4 to data.jsonl:9; no single row raises alone$"):
        score_groups([group(sample(4), "a"), group(sample(9), "b")], [crowded])


@pytest.mark.parametrize(
    "values, expected",
    [
        ([0.0], "returned 1 values for 2 completions, for the rows data.jsonl:4 to data.jsonl:4"),
        ([], "returned 0 values for 2 completions, for the rows data.jsonl:4 to data.jsonl:4"),
        (None, "returned NoneType, not a list of numbers, for the rows data.jsonl:4 to data.jsonl:4"),
        (0.5, "returned float, not a list of numbers, for the rows data.jsonl:4 to data.jsonl:4"),
    ],
)
def test_the_wrong_number_of_values(values, expected):
    with pytest.raises(RewardError) as caught:
        score_one(Reward("short", lambda **_: values), "a", "b", row=sample(4))
    assert str(caught.value) == f"reward short: {expected}"
