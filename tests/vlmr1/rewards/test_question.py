"""The question template that `auto` chooses, and that check, training and evaluation ask the same question."""

import json

import pytest

from vlmr1.cli import main
from vlmr1.data.templates import TEMPLATES, question_text
from vlmr1.rewards.question import Question, auto_template
from vlmr1.rewards.strict.accuracy import METHODS
from vlmr1.tiny import digits

BOTH = ("accuracy", "format")
OWN = "mine.py:mine"
AUTO = {  # rewards, method, template
    "iou": (BOTH, "iou", "rec"),
    "iou_qwen": (("accuracy",), "iou_qwen", "rec"),
    "map": (BOTH, "map", "odLength"),
    "weighted_sum": (("length", "format"), "weighted_sum", "odLength"),
    "point": (BOTH, "point_in_box", "gui"),
    "mcq": (BOTH, "mcq", "default"),
    "llm": (BOTH, "llm", "default"),
    "own beside accuracy": ((OWN, "accuracy"), "math", "default"),
    "a method that is not read": (("iou", "format"), "mcq", "rec"),
    "format of boxes": (("format_rec_qwen",), "mcq", "rec"),
    "format": ((OWN, "format"), "iou", "default"),
    "own": ((OWN,), "iou", "none"),
    "of no answer": (("overlong", "repetition"), "iou", "none"),
    "no method": (BOTH, ["iou"], "default"),
}


@pytest.mark.parametrize(("rewards", "method", "expected"), AUTO.values(), ids=AUTO.keys())
def test_auto(rewards, method, expected):
    assert auto_template(rewards, method) == expected


def test_every_method_has_one():
    assert {auto_template(BOTH, method) for method in METHODS} == {"rec", "odLength", "gui", "default"}


def test_a_row_decides_before_the_setting():
    question = Question("auto", BOTH, "iou", "internvl")
    assert question({"accu_reward_method": "mcq"}) == TEMPLATES["default"]
    assert question({"accu_reward_method": None}) == question({}) == question_text("rec", "internvl")
    assert str(question) == "question_template auto: rec, or by the column accu_reward_method of a row"
    assert str(Question("Look: {question}", BOTH, "iou")) == "question_template: 'Look: {question}'"


ANSWERS = {"iou": '{"bbox_2d": [0, 0, 20, 20]}', "mcq": "B", "default": "seven"}


def commands(folder, method, limit=None):
    """Check, train and evaluate, each with its default template."""
    path = folder / "rows.jsonl"
    images = sorted(path.name for path in (folder / "images").iterdir())[:3]
    rows = [{"prompt": "Where?", "image": name, "solution": ANSWERS[method]} for name in images]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    limits = [] if limit is None else ["--max_prompt_length", str(limit)]
    methods = ["--accu_reward_method", method]
    files = ["--data_file_paths", str(path), "--image_folders", str(folder / "images")]
    small = ["--max_steps", "1", "--prompts_per_device", "1", "--num_generations", "2", "--max_completion_length", "4"]
    small += ["--use_cpu", "true", "--write_report", "false", "--model_name_or_path", "tiny"]
    given = ["--data", str(path), "--images", str(folder / "images"), "--model", "tiny", "--use_cpu"]
    task = ["--task", "rec"] if method == "iou" else ["--task", "vqa", *methods]
    return {
        "check": ["data", "check", str(path), "--images", str(folder / "images"), *methods, "--model", "tiny", *limits],
        "train": ["train", *files, *methods, *small, *limits, "--output_dir", str(folder / f"out-{limit}")],
        "evaluate": ["evaluate", *given, *task, "--max_completion_length", "4", "--output_dir", str(folder / "eval")],
    }


@pytest.mark.parametrize(("method", "template"), [("iou", "rec"), ("mcq", "default"), ("default", "default")])
def test_all_commands_ask_the_same_question(method, template, tmp_path, capsys):
    digits.write(tmp_path, "train", 3, seed=1)
    for words in commands(tmp_path, method).values():
        assert main(words) == 0
        assert f"question_template auto: {template}\n" in capsys.readouterr().out


def test_a_row_that_passes_the_check_passes_in_training(tmp_path, capsys):
    """The longest prompt at the limit, and one token above it."""
    digits.write(tmp_path, "train", 3, seed=1)
    main(commands(tmp_path, "mcq")["check"])
    longest = max(int(line.split()[2]) for line in capsys.readouterr().out.splitlines() if " to " in line)
    for limit, statuses in ((longest, (0, 0)), (longest - 1, (1, 2))):
        words = commands(tmp_path, "mcq", limit)
        assert (main(words["check"]), main(words["train"])) == statuses
    assert f"the prompt has {longest} tokens, max_prompt_length is {longest - 1}" in capsys.readouterr().err
