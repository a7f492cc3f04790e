"""The command line of `vlmr1 evaluate`: defaults by task, and one message for what cannot be."""

from pathlib import Path

import pytest

from vlmr1.errors import SettingError
from vlmr1.evaluation.arguments import Compare, Evaluate, parse
from vlmr1.evaluation.outputs import slug, slugs

GIVEN = ["--model", "a", "b", "--data", "x.jsonl", "--output_dir", "out"]


def parsed(*words: str) -> Evaluate:
    asked = parse([*GIVEN, *words])
    assert isinstance(asked, Evaluate)
    return asked


@pytest.mark.parametrize(
    "task, template, tokens", [("rec", "rec", 256), ("ovd", "odLength", 1024), ("vqa", "auto", 1024)]
)
def test_defaults_by_task(task, template, tokens):
    asked = parsed("--task", task)
    assert asked.models == ["a", "b"]
    assert (asked.options.template, asked.options.tokens) == (template, tokens)
    assert parsed("--task", task, "--question_template", "none").options.template == "none"
    assert parsed("--task", task, "--max_completion_length", "7").options.tokens == 7


def test_judge_and_methods():
    words = ["--task", "vqa", "--accu_reward_method", "llm", "math", "--judge_url", "http://h/v1", "--judge_model", "m"]
    options = parsed(*words).options
    assert options.methods == ("llm", "math") and options.judge is not None and options.judge.model == "m"
    assert options.rewards().accu_reward_method == "llm" and options.written()["judge"] == {
        "url": "http://h/v1",
        "model": "m",
    }


def test_methods_are_joined_as_in_training():
    assert parsed("--task", "vqa", "--accu_reward_method", "default:mcq").options.methods == ("default", "mcq")


def test_compare():
    assert parse(["compare", "a", "b"]) == Compare([Path("a"), Path("b")], None)
    assert parse(["compare", "a", "--out", "t.md"]) == Compare([Path("a")], Path("t.md"))


def test_names_of_directories():
    assert slug("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen-Qwen2.5-VL-3B-Instruct"
    assert slug("/runs/rec/checkpoint-600/") == "runs-rec-checkpoint-600"
    assert slug("..") == "model" and len(slug("x/" * 100)) <= 89
    assert slug("x/" * 100 + "a") != slug("y/" * 100 + "a")
    with pytest.raises(SettingError, match="--model: a/b and a-b would both be written to a-b"):
        slugs(["a/b", "a-b"])
