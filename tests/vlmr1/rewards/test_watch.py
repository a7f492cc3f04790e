"""A reward that prints, takes long or raises on one row: the log names it and the row, and nothing is lost."""

import logging
import sys
import textwrap
import threading

import pytest

from tests.helpers.rewards import group, sample, values
from vlmr1.errors import DataError, RewardError
from vlmr1.rewards import score_groups
from vlmr1.rewards.groups import TimedOut, failure_counts
from vlmr1.rewards.judge import JudgeError

MINE = """
    def loud(prompts, completions, *, solution, **columns):
        for completion in completions:
            text = completion[0]["content"]
            print("saw", text)
            print("no end of line", end="")
            if text == "bad":
                raise ValueError(text)
            if text == "loop":
                print()
                while True:
                    print("again")
        return [1.0] * len(completions)

    loud.isolated = True
"""


@pytest.fixture
def loud(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(MINE))
    return f"{path}:loud"


def test_what_is_printed_here_is_logged_with_the_rows(caplog, capsys):
    def loud(prompts, completions, **columns):
        print("two\nlines", end="")
        logging.StreamHandler(sys.stdout).flush()
        return [0.0] * len(completions)

    score_groups([group(sample(4), "a"), group(sample(9), "b")], [loud])
    where = "reward loud printed for the rows data.jsonl:4 to data.jsonl:9: "
    assert [record.getMessage() for record in caplog.records] == [f"{where}two", f"{where}lines"]
    score_groups([group(sample(4), "a")], [loud])
    assert caplog.records[-1].getMessage() == (
        "reward loud printed for the row data.jsonl:4 and the completion 'a': lines"
    )
    assert capsys.readouterr().out == ""
    print("later")
    assert capsys.readouterr().out == "later\n"


def test_what_is_printed_in_a_worker_is_logged_with_the_row(pool, loud, caplog):
    zeros = []
    groups = [group(sample(1), "a"), group(sample(2), "bad", "loop")]
    scored = score_groups(groups, [loud], pool=pool, timed_out=zeros, working=set())
    assert values(scored) == [[[1]], [[0], [0]]]
    assert zeros == [TimedOut(loud, "data.jsonl:2", 0 + 1, 0, True), TimedOut(loud, "data.jsonl:2", 1, 1)]
    for line, text, words in (
        (1, "a", "saw a"),
        (1, "a", "no end of line"),
        (2, "bad", "no end of line"),
        (2, "loop", "again"),
    ):
        assert f"{loud} printed for the row data.jsonl:{line} and the completion {text!r}: {words}" in caplog.text
    assert (
        f"{loud} raised ValueError('bad') for the row data.jsonl:2 and the completion 'bad': its score is 0"
        in caplog.text
    )
    assert f"{loud} was not done in 1.5 s for the row data.jsonl:2 and the completion 'loop'" in caplog.text
    assert failure_counts(zeros) == {"reward_timeouts": 1, "reward_errors": 1}


def test_a_call_that_takes_long_is_logged_while_it_runs(monkeypatch):
    monkeypatch.setattr("vlmr1.rewards.watch.SLOW", 0.01)
    warned, messages = threading.Event(), []

    class Waiting(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())
            warned.set()

    def slow(prompts, completions, **columns):
        return [float(warned.wait(60))] * len(completions)

    handler = Waiting()
    logging.getLogger("vlmr1.rewards.watch").addHandler(handler)
    try:
        assert values(score_groups([group(sample(4), "a"), group(sample(9), "b")], [slow])) == [[[1]], [[1]]]
    finally:
        logging.getLogger("vlmr1.rewards.watch").removeHandler(handler)
    assert messages[0] == "reward slow has taken 0 s so far for the rows data.jsonl:4 to data.jsonl:9"


def fragile(prompts, completions, *, divisor, **columns):
    return [1 / each for each in divisor]


def test_a_function_that_raises_on_one_row_scores_the_others(caplog):
    groups = [
        group(sample(1, divisor=2), "a", "b"),
        group(sample(2, divisor=0), "c", "d"),
        group(sample(3, divisor=4), "e"),
    ]
    zeros, working = [], set()
    scored = score_groups(groups, [fragile], timed_out=zeros, working=working)
    assert values(scored) == [[[0.5], [0.5]], [[0], [0]], [[0.25]]]
    assert zeros == [TimedOut("fragile", "data.jsonl:2", 1, i, True) for i in range(2)] and working == {"fragile"}
    message = "reward fragile raised ZeroDivisionError('division by zero') for the row data.jsonl:2 and the completion"
    assert [f"{message} {text!r}: its score is 0" for text in "cd"] == [r.getMessage() for r in caplog.records]
    alone = groups[1:2]  # a function that has worked may fail for all of a later step
    assert values(score_groups(alone, [fragile], working=working)) == [[[0], [0]]]


@pytest.mark.parametrize("working", [None, set()], ids=["strict", "never worked"])
def test_a_function_that_never_works_is_an_error(working):
    groups = [group(sample(1, divisor=0), "b" * 500, "d")]
    if working is None:
        groups.insert(0, group(sample(4, divisor=2), "a"))
    with pytest.raises(RewardError) as caught:
        score_groups(groups, [fragile], working=working)
    words = "reward fragile: raised ZeroDivisionError('division by zero') for the row data.jsonl:1 and the completion"
    assert str(caught.value).startswith(f"{words} '{'b' * 117}...'")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("error", [DataError("data.jsonl:2: mend it"), JudgeError("no judge")])
def test_an_error_for_the_user_stops_the_run(error):
    def mine(prompts, completions, **columns):
        if any(completion[0]["content"] == "b" for completion in completions):
            raise error
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"mend it|no judge"):
        score_groups([group(sample(1), "a"), group(sample(2), "b")], [mine], working={"mine"})
