"""What each function reads from a completion or a solution; the cases are in `reward_texts.jsonl`."""

import json
from pathlib import Path

import pytest

from vlmr1.rewards import format_reward
from vlmr1.rewards.answer import find_answer, has_format, parse_box, parse_point, predicted_box, solution_box
from vlmr1.rewards.formula import normal_form, unboxed
from vlmr1.rewards.strict.counting import count
from vlmr1.rewards.strict.text import choice, decision
from vlmr1.rewards.vlm_r1.repair import repair

READERS = (choice, decision, count, find_answer, parse_box, solution_box, has_format, repair, normal_form, unboxed)
READERS += (predicted_box, parse_point)
BY_NAME = {reader.__name__: reader for reader in READERS}
PATH = Path(__file__).parents[2] / "data" / "reward_texts.jsonl"
CASES = [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['function']}-{case['text'][:40]}")
def test_what_is_read(case):
    found = BY_NAME[case["function"]](case["text"])
    expected = case["expected"]
    assert found == (tuple(expected) if case["function"].endswith(("_box", "_point")) and expected else expected)
    if case["function"] == "has_format":
        assert format_reward([[]], [[{"role": "assistant", "content": case["text"]}]]) == [float(expected)]


def test_texts_without_an_end():
    assert parse_box("[" * 100_000) is repair("[" * 100_000) is parse_box(f"[1, 2, 3, {'9' * 5000}]") is None


@pytest.mark.parametrize("text", [r"\sqrt", r"\frac", "a/b", r"1\text{ a}\text{ b}"])
def test_no_normal_form(text):
    with pytest.raises(ValueError):
        normal_form(text)
