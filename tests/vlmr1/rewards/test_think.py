"""A thought that the prompt's template has opened, and one that is empty."""

from copy import deepcopy
from dataclasses import replace

import pytest

from tests.helpers.rewards import answered, group, sample, values
from vlmr1.data.prompts import PromptBuilder
from vlmr1.errors import SettingError
from vlmr1.grpo.no_signal_warning import reason
from vlmr1.models import family_of
from vlmr1.rewards import RewardSettings, get_reward, score, score_groups
from vlmr1.rewards.failures import unreadable
from vlmr1.types import Sample

ANSWER = "<answer>[0, 0, 10, 10]</answer>"
OPENED = "<think>\n"
CLOSED = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    "opening, content, expected",
    [
        (OPENED, f"It is there.</think>{ANSWER}", 1),
        (OPENED, f"</think>{ANSWER}", 0),  # an empty thought
        (OPENED, f"<think>a</think>{ANSWER}", 0),  # opened twice
        (OPENED, f"It is at {ANSWER}", 0),  # not closed
        (OPENED, ANSWER, 0),
        (CLOSED, ANSWER, 0),  # the template has left out the thought
        ("", f"It is there.</think>{ANSWER}", 0),
        ("", f"<think>a</think>{ANSWER}", 1),
        ("", f"<think> \n</think>{ANSWER}", 0),
    ],
)
@pytest.mark.parametrize("name", ["format", "format_rec_qwen"])
def test_format_of_what_the_prompt_has_opened(opening, content, expected, name):
    row = group(sample(1), content)
    row = replace(row, prompt=replace(row.prompt, think_opening=opening))
    for allowed in (False, True):
        reward = get_reward(name, RewardSettings(allow_empty_think=allowed))
        is_empty = (opening, content) in [(OPENED, f"</think>{ANSWER}"), (CLOSED, ANSWER)] or "> \n<" in content
        assert values(score_groups([row], [reward])) == [[[1 if allowed and is_empty else expected]]]
    published = get_reward("format", RewardSettings(mode="vlm_r1"))
    assert values(score_groups([row], [published])) == [[[content.startswith("<think>")]]]


def test_boxes_are_not_read_in_a_thought_that_was_opened_by_the_prompt():
    for content, expected in (("So [0, 0, 10, 10]", 0), ("So.</think>[0, 0, 10, 10]", 1), (f"a</think>{ANSWER}", 1)):
        assert score("iou", content, ANSWER, think_opening=OPENED) == expected
        assert score("iou", content, ANSWER, mode="vlm_r1", think_opening=OPENED) == float("<answer>" in content)


def test_the_warning_names_empty_thoughts():
    groups = [group(sample(1), *[f"<think></think>{ANSWER}"] * 19, answered("x"))]
    rewards = [get_reward("format"), get_reward("accuracy")]
    shares = unreadable(groups, rewards)
    assert shares["empty_think"] == 0.95 and shares["parse_failures"] == 0
    flat = {"truncated": 0.0, "rewards/format/mean": 0.0, "rewards/accuracy/mean": 1.0, **shares}
    assert "95% of the completions have an empty <think> block" in reason(flat)
    assert "allow_empty_think=true" in reason(flat)
    for settings in (RewardSettings(allow_empty_think=True), RewardSettings(mode="vlm_r1")):
        assert "empty_think" not in unreadable(groups, [get_reward("format", settings)])
    assert "empty_think" not in unreadable(groups, [get_reward("accuracy")])
    assert unreadable([group(sample(1), answered("x"))], [get_reward("format")]) == {}


def test_the_published_mode_has_no_such_setting():
    with pytest.raises(SettingError, match="allow_empty_think is true with reward_mode vlm_r1"):
        RewardSettings(mode="vlm_r1", allow_empty_think=True)


@pytest.mark.parametrize("opening", ["", OPENED, "<think>", CLOSED, "<think></think>\n"])
@pytest.mark.parametrize("question", ["Where?", "Write <think>"])
def test_what_the_chat_template_opens(opening, question, model, processor):
    changed = deepcopy(processor)
    changed.chat_template = processor.tokenizer.chat_template + f"{{{{ {opening!r} }}}}"
    message = {"role": "user", "content": [{"type": "text", "text": question}]}
    builder = PromptBuilder(model, family_of(model), changed)
    assert builder(Sample([message], (), "", "made", 0)).think_opening == opening
