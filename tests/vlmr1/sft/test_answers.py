"""Answers of rows: where they stand, what is refused, and the tokens that are trained on."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.answers import sample, trainer_of
from tests.helpers.families import checkpoints
from vlmr1.config import SFTConfig
from vlmr1.errors import DataError
from vlmr1.rollout.stop_tokens import stop_token_ids
from vlmr1.sft.rows import AnswerReader

checkpoint = checkpoints("qwen2_5_vl", "glm4v", "idefics3")
TURNS = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "<answer>a</answer>"}]
CHAT = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "turn"}]
SAID = [{"role": "assistant", "content": "said"}]


def read(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> list[tuple[str, ...]]:
    """The answers of rows of a file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SFTConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    samples = AnswerReader.of(config, "qwen2_5_vl", SimpleNamespace()).training([str(path)], [])
    return [(each.solution, *each.other_solutions) for each in samples]


ANSWERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "the gpt turn": ({"conversations": TURNS}, ("<answer>a</answer>",)),
    "response": ({"conversations": TURNS, "response": "<think>b"}, ("<think>b",)),
    "responses, equal ones too": ({"conversations": TURNS, "response": ["b", "c", "b"]}, ("b", "c", "b")),
    "the turn before a solution": ({"messages": CHAT, "solution": "s"}, ("turn",)),
    "solution": ({"messages": CHAT[:1], "solution": "s"}, ("s",)),
    "solutions": ({"prompt": "Where?", "solution": ["s", "t"]}, ("s", "t")),
    "boxes": ({"prompt": "Where?", "solution": [{"bbox": [1]}]}, ('[{"bbox": [1]}]',)),
    "completion": ({"prompt": CHAT[:1], "completion": SAID}, ("said",)),
    "completions": ({"prompt": "Where?", "completion": [SAID, "other"]}, ("said", "other")),
    "parts": ({"prompt": "Where?", "completion": [SAID[0] | {"content": [{"type": "text", "text": "p"}]}]}, ("p",)),
    "response of ms-swift": ({"query": "Where?", "response": "r"}, ("r",)),
}


@pytest.mark.parametrize(("row", "answers"), ANSWERS.values(), ids=ANSWERS.keys())
def test_answers_of_a_row(row, answers, tmp_path):
    assert read(tmp_path, row) == [answers]


def test_a_column_of_another_name(tmp_path):
    row = {"conversations": TURNS, "response": "no", "draft": {"text": "yes"}}
    assert read(tmp_path, row, response_column="draft.text") == [("yes",)]


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"prompt": "Where?", "text": "a"}, "none of the columns response, completion, solution"),
    "empty": ({"prompt": "Where?", "response": " "}, "the answer is empty"),
    "one of several is empty": ({"prompt": "Where?", "response": ["a", ""]}, "the answer is empty"),
    "several turns": ({"prompt": CHAT[:1], "completion": [*SAID, *CHAT]}, "one turn of the assistant"),
    "a turn of the user": ({"prompt": CHAT[:1], "completion": CHAT[:1]}, "one turn of the assistant"),
    "an image token": ({"prompt": "Where?", "response": "<|image_pad|>"}, "in the answer"),
    "an unknown role": ({"prompt": "Where?", "completion": [{"role": "tool", "content": "a"}]}, "a message is"),
}


@pytest.mark.parametrize(("row", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_rows_without_an_answer_are_refused_with_file_and_line(row, words, tmp_path):
    with pytest.raises(DataError) as error:
        read(tmp_path, {"prompt": "Where?", "response": "a"}, row)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:2: ") and words in str(error.value)


def test_tokens_of_answers(model, processor, image_files, tmp_path):
    """An answer is followed by what the chat template adds, and ends a turn; a longer one is cut without an end."""
    rows = [sample(0, "Where is the digit?", [image_files[56]], "at the top", "here" * 20)]
    tokenizer, ends = processor.tokenizer, stop_token_ids(model, processor.tokenizer, processor.chat_template)
    group = trainer_of(model, processor, tmp_path, rows).train_dataset[0]
    for completion, answer in zip(group.completions, ("at the top", "here" * 20), strict=True):
        ids = completion.token_ids.tolist()
        end = next(place for place, token in enumerate(ids) if token in ends)
        assert tokenizer.decode(ids[:end]).strip() == answer and completion.finish_reason == "stop"
        assert tokenizer.decode(ids[end + 1 :]).strip() == ""
    longest = len(group.prompt.input_ids) + len(group.completions[0].token_ids)
    short, cut = trainer_of(model, processor, tmp_path, rows, max_length=longest).train_dataset[0].completions
    assert short.token_ids.tolist() == group.completions[0].token_ids.tolist() and short.finish_reason == "stop"
    assert len(cut.token_ids) == len(short.token_ids) and cut.finish_reason == "length"
    assert cut.token_ids.tolist() == group.completions[1].token_ids[: len(cut.token_ids)].tolist()
    trainer = trainer_of(model, processor, tmp_path, rows, max_length=len(group.prompt.input_ids))
    with pytest.raises(DataError, match=r"^rows.jsonl:1: the prompt has .* max_length is .*overlong_prompts=filter"):
        trainer.train_dataset[0]


def test_a_template_that_renders_an_answer_in_another_way(model, processor, image_files, tmp_path):
    rows = [sample(0, "Where?", [image_files[56]], "here")]
    trainer = trainer_of(model, processor, tmp_path, rows)
    opening = processor.apply_chat_template(rows[0].messages, tokenize=False, add_generation_prompt=True)
    trainer.train_dataset.builder.text = lambda messages, opens=True: opening if opens else f"{opening[:-3]}here"
    with pytest.raises(DataError, match=r"^rows.jsonl:1: the chat template"):
        trainer.train_dataset[0]
