"""The reward pool: time limits, deaths, order, which functions run in it, and how it ends."""

import contextlib
import os
import textwrap
from pathlib import Path

import pytest

from tests.helpers.python import python
from tests.helpers.rewards import answered, group, sample, values
from vlmr1.errors import RewardError, SettingError
from vlmr1.rewards import RewardPool, RewardSettings, get_reward, score_groups
from vlmr1.rewards.groups import TimedOut

MINE = """
    import os, time

    def mine(prompts, completions, *, solution, **columns):
        return [one(completion[0]["content"]) for completion in completions]

    def one(text):
        if text == "loop":
            open(f"{__file__}.runs", "w").close()
            while True:
                pass
        if text == "die":
            os._exit(7)
        if text == "raise":
            raise Odd("odd", text)
        if text == "nan":
            return float("nan")
        return float(text)

    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(one)

    def process(prompts, completions, **columns):
        time.sleep(0.02)
        return [os.getpid()] * len(completions)

    def count(prompts, completions, **columns):
        return [len(completions)] * len(completions)

    def whole(prompts, completions, **columns):
        return count(prompts, completions)

    mine.isolated = process.isolated = count.one_by_one = True
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(MINE))
    return str(path)


def workers_of_ours():
    """Processes of reward pools that this process has started."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that ends meanwhile
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"vlmr1.rewards.worker" in (status.parent / "cmdline").read_bytes():
                found.add(int(status.parent.name))
    return found


def test_what_overruns_scores_zero_and_is_recorded(pool, mine):
    groups = [group(sample(1), "1", "loop", "2"), group(sample(2), "3", "4", "loop")]
    timed_out, others = [], workers_of_ours()  # of other tests' trainers
    scored = score_groups(groups, [f"{mine}:mine"], pool=pool, timed_out=timed_out)
    assert values(scored) == [[[1], [0], [2]], [[3], [4], [0]]]
    assert timed_out == [TimedOut(f"{mine}:mine", "data.jsonl:1", 0, 1), TimedOut(f"{mine}:mine", "data.jsonl:2", 1, 2)]
    assert workers_of_ours() - others == {worker.process.pid for worker in pool._idle}  # those in a loop are gone
    assert values(score_groups(groups[:1], [lambda completions, **_: [1] * len(completions)], pool=pool)) == [[[1]] * 3]


def test_many_results_come_in_order(pool, mine):
    texts = [str(i) for i in range(50)]
    assert values(score_groups([group(sample(1), *texts)], [f"{mine}:mine"], pool=pool)) == [[[i] for i in range(50)]]


def test_a_death_is_an_error_that_names_the_row(pool, mine):
    with pytest.raises(RewardError) as caught:
        score_groups([group(sample(1), "1"), group(sample(2), "die")], [f"{mine}:mine"], pool=pool)
    assert str(caught.value) == (
        f"reward {mine}:mine: its process died with exit status 7 for the row data.jsonl:2 and the completion 'die'"
    )
    assert values(score_groups([group(sample(1), "1")], [f"{mine}:mine"], pool=pool)) == [[[1]]]  # others start


@pytest.mark.parametrize(
    "text, message",
    [
        ("raise", "raised RuntimeError(\"Odd('odd')\") for the row data.jsonl:2 and the completion 'raise'"),
        ("x", "raised ValueError(\"could not convert string to float: 'x'\") for the row data.jsonl:2 and"),
        ("nan", "returned nan, not a finite number, for the row data.jsonl:2 and the completion 'nan'"),
    ],
)
def test_what_a_function_raises_or_returns_names_the_row(pool, mine, text, message):
    with pytest.raises(RewardError) as caught:
        score_groups([group(sample(1), "1"), group(sample(2), "2", text)], [f"{mine}:mine"], pool=pool)
    assert message in str(caught.value)


def test_which_process_a_function_runs_in(pool, mine, monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(mine))

    def here(prompts, completions, **columns):
        return [os.getpid()] * len(completions)

    fresh = RewardPool(2, timeout=5)  # which knows the new path
    texts = ["1"] * 8
    names = [here, f"{mine}:process", "mine:process", f"{mine}:count", f"{mine}:whole"]
    (rows,) = values(score_groups([group(sample(1), *texts)], names, pool=fresh))
    fresh.close()
    columns = list(zip(*rows, strict=True))
    assert set(columns[0]) == {os.getpid()}
    for pids in columns[1:3]:
        assert len(set(pids)) == 2 and os.getpid() not in pids
    assert set(columns[3]) == {1} and set(columns[4]) == {8}  # one completion a call; the whole batch


def test_the_former_name_of_the_attribute_is_noted(mine, caplog):
    for name in ("count", "process"):
        get_reward(f"{mine}:{name}")
    assert caplog.text.count("isolated") == 1 and f"{mine}:count" in caplog.text


def test_our_rewards_are_the_same_in_it(pool):
    rows = [
        (sample(1, "1/2", accu_reward_method="default"), [answered("0.5"), answered("2/3"), "0.5"]),
        (sample(2, "x=3", accu_reward_method="math"), [answered("3"), answered("4"), ""]),
        (sample(3), [answered("[0, 0, 5, 10]"), answered("[0, 0, 10, 10]"), "x"]),
    ]
    groups = [group(row, *texts) for row, texts in rows]
    for mode in ("strict", "vlm_r1"):
        settings = RewardSettings(mode=mode)
        rewards = [get_reward(name, settings) for name in ("accuracy", "format", "repetition")]
        assert values(score_groups(groups, rewards, pool=pool)) == values(score_groups(groups, rewards))


def test_only_what_may_be_slow_leaves_this_process():
    """A pool that has no process yet stays so for boxes, and starts some for formulas."""
    fresh = RewardPool(1, timeout=20)
    rewards = ["accuracy", "format"]
    score_groups([group(sample(1), answered("[0, 0, 5, 10]"))], rewards, pool=fresh)
    assert not fresh._idle
    score_groups([group(sample(1, "1/2", accu_reward_method="math"), answered("0.5"))], rewards, pool=fresh)
    assert len(fresh._idle) == 1
    fresh.close()
    assert not fresh._idle


@pytest.mark.parametrize("text", ["1", "loop"])
def test_the_processes_end_with_theirs(mine, text):
    """A parent that ends at once leaves no process, be it idle or in a loop: the output would stay open."""
    code = f"""
        import os, threading, time
        from vlmr1.rewards.pool import RewardPool

        def end():
            while not os.path.exists({f"{mine}.runs"!r}):
                time.sleep(0.01)
            os._exit(0)

        threading.Thread(target=end).start()
        arguments = {{"prompts": [], "completions": [[{{"content": {text!r}}}]], "solution": []}}
        pool = RewardPool(1, timeout=100)
        print(pool.run([({f"{mine}:mine"!r}, arguments)])[0].value, flush=True)
        open({f"{mine}.runs"!r}, "w")
    """
    done = python("-c", textwrap.dedent(code), check=True, timeout=300)
    assert done.stdout == ("[1.0]\n" if text == "1" else "")


@pytest.mark.parametrize("workers, timeout, message", [(0, 1, "reward_workers is 0"), (1, 0, "reward_timeout is 0")])
def test_settings_out_of_range(workers, timeout, message):
    with pytest.raises(SettingError, match=message):
        RewardPool(workers, timeout)
