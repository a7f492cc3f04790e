"""Question templates: the words themselves, by name, by family, and as a text."""

import pytest

from vlmr1.data.templates import TEMPLATES, question_text
from vlmr1.errors import SettingError

DEFAULT = (
    "Q First output the thinking process in <think> </think> tags and then output the final answer in <answer> "
    "</answer> tags."
)
REC = DEFAULT + " Output the final answer in JSON format."
IC = (
    "Q First thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think><answer> json format answer here </answer>"
)
OD_LENGTH = (
    "First thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think><answer> answer here </answer>\nQ"
)
NO_THINK = "Q Output the final answer in <answer> </answer> tags."


@pytest.mark.parametrize(
    "name, model_type, expected",
    [
        ("default", None, DEFAULT),
        ("default", "qwen2_5_vl", DEFAULT),
        ("rec", None, REC),
        ("rec", "qwen2_vl", REC),
        ("rec", "qwen2_5_vl", REC),
        ("rec", "qwen3_vl", REC),
        ("rec", "internvl", DEFAULT),
        ("rec", "glm4v", DEFAULT),
        ("ic", "qwen2_5_vl", IC),
        ("ic", "internvl", DEFAULT),
        ("odLength", "qwen2_5_vl", OD_LENGTH),
        ("odLength", "glm4v", DEFAULT),
        ("gui", "qwen2_5_vl", DEFAULT),
        ("gui", "internvl", DEFAULT),
        ("no-think", "internvl", NO_THINK),
        ("none", "glm4v", "Q"),
        ("Look: {question} Now.", "internvl", "Look: Q Now."),
    ],
)
def test_words(name, model_type, expected):
    assert question_text(name, model_type).replace("{question}", "Q") == expected


def test_every_template_holds_the_question_once():
    assert set(TEMPLATES) == {"default", "rec", "ic", "odLength", "gui", "no-think", "none"}
    assert {text.count("{question}") for text in TEMPLATES.values()} == {1}


@pytest.mark.parametrize("text", ["odlength", "", "Look", "{question} {question}", "<image>{question}"])
def test_refused(text):
    with pytest.raises(SettingError) as caught:
        question_text(text)
    assert str(caught.value).startswith(f"question_template is {text!r}: ")
